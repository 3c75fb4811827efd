// Macros with which the kernels compile as CUDA and, for the tests, as C++ on the host. On the host, a
// block's threads are system threads and `BARRIER` is a real barrier, so that a missing barrier is a race,
// which a sanitizer finds.

typedef unsigned int u32;
typedef unsigned long long u64;

#define MOST_THREADS 256

#ifndef HOST_DIALECT
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ inline
#define SHARED __shared__
#define BARRIER __syncthreads();
// Other blocks see a thread's writes before the fence earlier than its writes after it.
#define FENCE __threadfence();
// Adds one to a counter that blocks share and returns its previous value.
#define COUNT(counter) atomicAdd(counter, 1u)
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define BLOCK blockIdx.x
#define BLOCKS gridDim.x
#define BLOCK_ROW blockIdx.y
#define BLOCK_ROWS gridDim.y
#endif
