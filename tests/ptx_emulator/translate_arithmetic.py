"""Translates sums, products, quotients and functions of numbers."""

from __future__ import annotations

from tests.ptx_emulator.element_types import DTYPES, SIZE
from tests.ptx_emulator.operands import Operands
from tests.ptx_emulator.parser import (
    Instruction,
    Operand,
)


class Arithmetic(Operands):
    """Instructions that compute numbers."""

    def arithmetic(self, ins: Instruction, integer: str, single: str) -> None:
        """Two operands: ``integer`` and ``single`` are expressions of {a} and {b}."""
        target, a, b = ins.operands
        kind = ins.op[-1]
        if "cc" in ins.op:
            return self.unsupported()
        if kind[0] in "usb" and not kind.startswith("bf"):
            dtype = "u" + DTYPES[kind][1]
            self.put(target, integer.format(a=self.src(a, dtype), b=self.src(b, dtype)), dtype)
            return
        self.floating(ins, single, a, b)

    def floating(self, ins: Instruction, text: str, *operands: Operand) -> None:
        """A float operation of any width, with ftz, saturation and rounding mode."""
        target, kind = ins.operands[0], ins.op[-1]
        names = dict(zip("abc", operands, strict=False))
        flush, mode = "ftz" in ins.op, next((m for m in ("rz", "rm", "rp") if m in ins.op), "rn")
        if kind == "f32":
            values = {n: self.src(o, "f4") for n, o in names.items()}
            if flush:
                values = {n: f"ftz({v})" for n, v in values.items()}
            if mode != "rn":
                values = {
                    n: f"f8({v})" if v[0] == "K" else f"{v}.astype(f8)" for n, v in values.items()
                }
                out = f"narrow({text.format(**values)}, {mode!r})"
            else:
                out = text.format(**values)
            if flush:
                out = f"ftz({out})"
            if "sat" in ins.op:
                out = f"sat({out})"
            self.put(target, out, "f4")
        elif kind == "f64":
            values = {n: self.src(o, "f8") for n, o in names.items()}
            self.put(target, text.replace("fma32", "fma64").format(**values), "f8")
        elif kind in ("f16", "f16x2"):
            dtype = DTYPES[kind]
            values = {
                n: f"np.asarray({self.src(o, f'u{SIZE[dtype]}')}).reshape(-1).view(f2)"
                for n, o in names.items()
            }
            out = text.replace("fma32", "fma16").format(**values)
            self.put(target, f"({out}).view(u{SIZE[dtype]})", f"u{SIZE[dtype]}")
        elif kind in ("bf16", "bf16x2"):
            size = SIZE[DTYPES[kind]]
            values = {
                n: f"from_bf16(np.asarray({self.src(o, f'u{size}')}).reshape(-1).view(u2))"
                ".astype(f8)"
                for n, o in names.items()
            }
            out = text.replace("fma32({a}, {b}, {c})", "{a} * {b} + {c}").format(**values)
            self.put(target, f"bf16_of_f64({out}).view(u{size})", f"u{size}")
        else:
            self.unsupported()

    def op_add(self, ins: Instruction) -> None:
        self.arithmetic(ins, "{a} + {b}", "{a} + {b}")

    def op_sub(self, ins: Instruction) -> None:
        self.arithmetic(ins, "{a} - {b}", "{a} - {b}")

    def op_mul(self, ins: Instruction) -> None:
        target, a, b = ins.operands
        kind = ins.op[-1]
        if "wide" in ins.op:
            self.put(
                target,
                self.wide(kind, a, b),
                f"{kind[0]}{2 * SIZE[DTYPES[kind]]}".replace("s", "i"),
            )
        elif "hi" in ins.op:
            dtype = DTYPES[kind]
            self.put(target, f"mul_hi({self.src(a, dtype)}, {self.src(b, dtype)})", dtype)
        else:
            self.arithmetic(ins, "{a} * {b}", "{a} * {b}")

    def wide(self, kind: str, a: Operand, b: Operand) -> str:
        """A product of twice the width."""
        dtype = DTYPES[kind]
        twice = f"{dtype[0]}{2 * SIZE[dtype]}"
        return f"{self.src(a, dtype)}.astype({twice}) * {self.src(b, dtype)}.astype({twice})"

    def op_mad(self, ins: Instruction) -> None:
        target, a, b, c = ins.operands
        kind = ins.op[-1]
        if kind[0] == "f":
            return self.op_fma(ins)
        if "cc" in ins.op:
            return self.unsupported()
        dtype = DTYPES[kind]
        if "wide" in ins.op:
            twice = f"{dtype[0]}{2 * SIZE[dtype]}"
            self.put(target, f"{self.wide(kind, a, b)} + {self.src(c, twice)}", twice)
        elif "hi" in ins.op:
            self.put(
                target,
                f"mul_hi({self.src(a, dtype)}, {self.src(b, dtype)}) + {self.src(c, dtype)}",
                dtype,
            )
        else:
            plain = "u" + dtype[1]
            self.put(
                target, f"{self.src(a, plain)} * {self.src(b, plain)} + {self.src(c, plain)}", plain
            )

    def op_fma(self, ins: Instruction) -> None:
        if ins.op[-1] == "f32" and any(m in ins.op for m in ("rz", "rm", "rp")):
            return self.floating(ins, "{a} * {b} + {c}", *ins.operands[1:])
        self.floating(ins, "fma32({a}, {b}, {c})", *ins.operands[1:])

    def op_div(self, ins: Instruction) -> None:
        target, a, b = ins.operands
        kind = ins.op[-1]
        if kind[0] == "f":
            return self.floating(ins, "{a} / {b}", a, b)
        dtype = DTYPES[kind]
        self.put(target, f"div_int({self.array(a, dtype)}, {self.src(b, dtype)})", dtype)

    def op_rem(self, ins: Instruction) -> None:
        target, a, b = ins.operands
        dtype = DTYPES[ins.op[-1]]
        self.put(target, f"rem_int({self.array(a, dtype)}, {self.src(b, dtype)})", dtype)

    def op_abs(self, ins: Instruction) -> None:
        self.unary(ins, "np.abs({a})", "np.abs({a})")

    def op_neg(self, ins: Instruction) -> None:
        self.unary(ins, "-{a}", "-{a}")

    def unary(self, ins: Instruction, integer: str, single: str) -> None:
        """One operand: expressions for integers and for floats."""
        target, a = ins.operands
        kind = ins.op[-1]
        if kind[0] in "us":
            self.put(target, integer.format(a=self.src(a, DTYPES[kind])), DTYPES[kind])
        elif kind in ("f16x2", "bf16x2", "bf16", "f16"):
            size = SIZE[DTYPES[kind]]
            sign = {2: 0x8000, 4: 0x80008000}[size]
            text = self.src(a, f"u{size}")
            operation = (
                f"{text} ^ {sign}"
                if ins.op[0] == "neg"
                else f"{text} & {sign ^ (2 ** (8 * size) - 1)}"
            )
            self.put(target, operation, f"u{size}")
        else:
            self.floating(ins, single, a)

    def op_min(self, ins: Instruction) -> None:
        self.extreme(ins, "min")

    def op_max(self, ins: Instruction) -> None:
        self.extreme(ins, "max")

    def extreme(self, ins: Instruction, which: str) -> None:
        """Minimum or maximum of two or three."""
        target, *sources = ins.operands
        kind = ins.op[-1]
        if kind[0] in "us":
            dtype = DTYPES[kind]
            a, b = (self.src(x, dtype) for x in sources)
            self.put(target, f"np.{which}imum({a}, {b})", dtype)
            return
        name = f"f{which}_nan" if "NaN" in ins.op else f"f{which}"
        text = f"{name}({{a}}, {{b}})"
        if len(sources) == 3:
            text = f"{name}({text}, {{c}})"
        if "xorsign" in ins.op:
            return self.unsupported()
        self.floating(ins, text, *sources)

    def op_copysign(self, ins: Instruction) -> None:
        target, a, b = ins.operands
        dtype = DTYPES[ins.op[-1]]
        self.put(target, f"np.copysign({self.src(b, dtype)}, {self.src(a, dtype)})", dtype)

    def op_testp(self, ins: Instruction) -> None:
        target, a = ins.operands
        dtype = DTYPES[ins.op[-1]]
        test = {
            "finite": "np.isfinite({a})",
            "infinite": "np.isinf({a})",
            "notanumber": "np.isnan({a})",
            "number": "~np.isnan({a})",
        }.get(ins.op[1])
        if test is None:
            return self.unsupported()
        self.put(target, test.format(a=self.src(a, dtype)), "b1")

    def special_function(self, ins: Instruction, function: str) -> None:
        """A function that numpy or ``semantics`` knows by this name."""
        target, a = ins.operands
        kind = ins.op[-1]
        if kind == "f32":
            self.put(
                target,
                f"S.approximately(approx({function}, {self.src(a, 'f4')}, {'ftz' in ins.op}), "
                f"{'approx' in ins.op})",
                "f4",
            )
        elif kind == "f64":
            self.put(target, f"{function}({self.src(a, 'f8')})", "f8")
        else:
            self.unsupported()

    def op_ex2(self, ins: Instruction) -> None:
        self.special_function(ins, "np.exp2")

    def op_lg2(self, ins: Instruction) -> None:
        self.special_function(ins, "np.log2")

    def op_rcp(self, ins: Instruction) -> None:
        self.special_function(ins, "rcp")

    def op_sqrt(self, ins: Instruction) -> None:
        self.special_function(ins, "np.sqrt")

    def op_rsqrt(self, ins: Instruction) -> None:
        self.special_function(ins, "rsqrt")

    def op_sin(self, ins: Instruction) -> None:
        self.special_function(ins, "np.sin")

    def op_cos(self, ins: Instruction) -> None:
        self.special_function(ins, "np.cos")

    def op_tanh(self, ins: Instruction) -> None:
        self.special_function(ins, "np.tanh")
