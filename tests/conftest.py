"""What all tests share: the number of threads and the one table of tolerances."""

import torch

torch.set_num_threads(2)

#: Error allowed beyond eager's, relative to the largest expected value, by the result's dtype.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
