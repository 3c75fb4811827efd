// Makes CUDA C++ compile on the host: its keywords and intrinsics, for one running thread at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
// Without an architecture the toolkit's headers compute half precision on the host; with one, kernels use it.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#undef __CUDA_ARCH__
#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __CUDA_ARCH__ 800
#ifdef LISTING
#define __global__ kernel_here
#else
#define __global__
#endif
#define __device__
#define __shared__ static // blocks run one after another
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { unsigned x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim; // set by the scheduler before a thread continues

// The barriers of a block and of a warp.
void __syncthreads();
void wait_for_warp();
inline void __syncwarp(unsigned = ~0u) { wait_for_warp(); }
inline void __threadfence() {}

extern char warp_values[1024][16];
inline unsigned flat_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    unsigned self = flat_thread();
    memcpy(warp_values[self], &value, sizeof value);
    wait_for_warp();
    memcpy(&value, warp_values[self ^ (unsigned)mask], sizeof value);
    wait_for_warp();
    return value;
}

inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
}

// One thread runs at a time, so that every read and write is atomic.
template <typename T, typename U> T atomicAdd(T *at, U value) { T old = *at; *at = old + (T)value; return old; }
template <typename T, typename U> T atomicMax(T *at, U value) { T old = *at; if ((T)value > old) *at = (T)value; return old; }
template <typename T, typename U> T atomicMin(T *at, U value) { T old = *at; if ((T)value < old) *at = (T)value; return old; }
template <typename T> T atomicExch(T *at, T value) { T old = *at; *at = value; return old; }
template <typename T> T atomicCAS(T *at, T compare, T value) { T old = *at; if (old == compare) *at = value; return old; }

template <typename To, typename From> To same_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "of one size");
    memcpy(&to, &from, sizeof to);
    return to;
}
inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }

using std::isinf;
using std::isnan;
using std::signbit;
template <typename A, typename B> auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <typename A, typename B> auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.7071067811865476); }

#define HALF_FUNCTION(name, function) \
    inline __half h##name(__half x) { return __float2half(function(__half2float(x))); } \
    inline __nv_bfloat16 h##name(__nv_bfloat16 x) { return __float2bfloat16(function(__bfloat162float(x))); }
HALF_FUNCTION(sqrt, sqrtf)
HALF_FUNCTION(sin, sinf)
HALF_FUNCTION(cos, cosf)
HALF_FUNCTION(exp, expf)
HALF_FUNCTION(log, logf)
