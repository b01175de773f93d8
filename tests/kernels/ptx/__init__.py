"""Emulator of the PTX that Triton emits for sm_80 and sm_90: compiled kernels run on CPU tensors, without a GPU.

It executes the compiler's output with its layouts, shuffles, barriers and pipelines. Triton's interpreter shows none of
these, and computes bfloat16 wrongly. The emulator checks:

- every global access is inside a tensor of the launch, and aligned as the instruction needs;
- no two programs, and no two warps between barriers, access the same byte if one of them writes;
- shared memory stays in bounds, and copies and products are waited for.

Tensor cores cut off the low bits of float32 operands and of their sums, as hardware does. Asynchronous work happens as
late as the program allows. Timing, memory order beyond barriers, clusters and textures are not modelled.
"""
