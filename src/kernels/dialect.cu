// What the kernels are written in: CUDA, of which plain C is a dialect that the tests compile.
//
// A kernel is a row of phases, `EACH_THREAD { .. }`, with `BARRIER` between them; what passes from one phase to the
// next is in memory. So C runs a block as loops over its threads, and a kernel means the same there.

typedef unsigned int u32;
typedef unsigned long long u64;

#define MOST_THREADS 256

#ifndef HOST_DIALECT
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ inline
#define SHARED __shared__
#define EACH_THREAD
#define BARRIER __syncthreads();
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define BLOCK blockIdx.x
#define BLOCKS gridDim.x
#define BLOCK_ROW blockIdx.y
#endif
