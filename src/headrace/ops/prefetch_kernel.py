# mypy: disable-error-code="no-untyped-def"
"""Memory into L2 before its use, while others leave the bus idle; nobody waits for it.

By lines, or in bulk (sm_90), where one instruction asks for kilobytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

# the first thread of warp i asks for piece i: the instruction takes one thread of a warp after the
# other, at 50 cycles and more each. Address, bytes in all, bytes of a piece
_PREFETCH_PTX = tl.constexpr("""{
.reg .pred mine;
.reg .b32 first, size;
.reg .b64 address;
mov.u32 $0, %tid.x;
and.b32 size, $0, 31;
setp.eq.u32 mine, size, 0;
shr.u32 first, $0, 5;
mul.lo.u32 first, first, $3;
setp.lt.and.u32 mine, first, $2, mine;
sub.u32 size, $2, first;
min.u32 size, size, $3;
cvt.u64.u32 address, first;
add.u64 address, address, $1;
@mine cp.async.bulk.prefetch.L2.global [address], size;
}""")


@triton.jit
def prefetch_lines(ptrs):
    """Ask for the 128 bytes around each pointer."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch(ptr, num_bytes):
    """Ask for num_bytes at ptr, both multiples of 16; less than 1 MB for each warp."""
    piece = tl.cdiv(num_bytes, num_warps() * 16) * 16
    tl.inline_asm_elementwise(
        _PREFETCH_PTX,
        "=r,l,r,r",
        [ptr, num_bytes.to(tl.int32), piece.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
