# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Where 16 and 32 bits meet inside a kernel: rounding and matrix products, the same on a GPU and in the interpreter.

Triton's interpreter (seen in 3.7.1) keeps bfloat16 as bare 16-bit integers: it rounds float32 towards zero, not to
nearest even, makes subnormals 0, and multiplies the integers in ``tl.dot``. All that is mended here, so a kernel run
without a GPU shows the error it would have on one. Compiled code holds none of it: the flag is a compile-time constant.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to nearest even in ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def dot(a, b):
    """``a @ b`` in float32; 32-bit inputs are multiplied in full precision, not as TF32."""
    if INTERPRETED:  # float32 holds a product of two 16-bit floats exactly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
