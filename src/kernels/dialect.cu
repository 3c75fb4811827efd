// What the kernels are written in: CUDA, of which C++ on the host is a dialect that the tests compile. There a block's
// threads are threads of the system and `BARRIER` is a real one, so that a missing barrier is a race that a sanitizer
// finds.

typedef unsigned int u32;
typedef unsigned long long u64;

#define MOST_THREADS 256

#ifndef HOST_DIALECT
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ inline
#define SHARED __shared__
#define BARRIER __syncthreads();
// What a thread has written before, other blocks see before what it writes after.
#define FENCE __threadfence();
// Adds one to a counter that blocks share; what it was before.
#define COUNT(counter) atomicAdd(counter, 1u)
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define BLOCK blockIdx.x
#define BLOCKS gridDim.x
#define BLOCK_ROW blockIdx.y
#define BLOCK_ROWS gridDim.y
#endif
