// The parts of cuBLAS and cuRAND that candle and this crate call: products as plain loops, random numbers
// from a standard generator.

#include <cublas_v2.h>
#include <curand.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "driver.h"
#include "kernel.h"

struct cublasContext { CUstream stream; };
struct curandGenerator_st { CUstream stream; std::mt19937_64 engine; };

namespace {

double read(const void *xs, cudaDataType_t type, long long i) {
    switch (type) {
    case CUDA_R_64F: return ((const double *)xs)[i];
    case CUDA_R_16F: return __half2float(((const __half *)xs)[i]);
    case CUDA_R_16BF: return __bfloat162float(((const __nv_bfloat16 *)xs)[i]);
    default: return ((const float *)xs)[i];
    }
}

void write(void *xs, cudaDataType_t type, long long i, double x) {
    switch (type) {
    case CUDA_R_64F: ((double *)xs)[i] = x; break;
    case CUDA_R_16F: ((__half *)xs)[i] = __float2half((float)x); break;
    case CUDA_R_16BF: ((__nv_bfloat16 *)xs)[i] = __float2bfloat16((float)x); break;
    default: ((float *)xs)[i] = (float)x;
    }
}

size_t size_of(cudaDataType_t type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

struct Operand {
    const void *data;
    cudaDataType_t type;
    int leading;
    cublasOperation_t op;
};

// C = alpha op(A) op(B) + beta C in column-major order; sums are in double if C is, else in single precision.
template <typename T>
void product(int m, int n, int k, double alpha, Operand a, Operand b, double beta, void *c, cudaDataType_t type, int leading) {
    std::vector<T> rows((size_t)m * k), columns((size_t)n * k);
    for (int i = 0; i < m; i++)
        for (int l = 0; l < k; l++)
            rows[(size_t)i * k + l] = (T)read(a.data, a.type, a.op == CUBLAS_OP_N ? i + (long long)l * a.leading : l + (long long)i * a.leading);
    for (int j = 0; j < n; j++)
        for (int l = 0; l < k; l++)
            columns[(size_t)j * k + l] = (T)read(b.data, b.type, b.op == CUBLAS_OP_N ? l + (long long)j * b.leading : j + (long long)l * b.leading);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            const T *row = &rows[(size_t)i * k], *column = &columns[(size_t)j * k];
            T sums[8] = {};
            int l = 0;
            for (; l + 8 <= k; l += 8)
                for (int lane = 0; lane < 8; lane++) sums[lane] += row[l + lane] * column[l + lane];
            T sum = 0;
            for (; l < k; l++) sum += row[l] * column[l];
            for (T part : sums) sum += part;
            long long at = i + (long long)j * leading;
            write(c, type, at, alpha * sum + (beta == 0.0 ? 0.0 : beta * read(c, type, at)));
        }
}

void any_product(int m, int n, int k, double alpha, Operand a, Operand b, double beta, void *c, cudaDataType_t type, int leading) {
    if (type == CUDA_R_64F) product<double>(m, n, k, alpha, a, b, beta, c, type, leading);
    else product<float>(m, n, k, alpha, a, b, beta, c, type, leading);
}

double scalar(const void *x, cublasComputeType_t type) {
    if (type == CUBLAS_COMPUTE_64F) return *(const double *)x;
    if (type == CUBLAS_COMPUTE_16F) return __half2float(*(const __half *)x);
    return *(const float *)x;
}

const char *shifted(const void *data, cudaDataType_t type, long long elements) {
    return (const char *)data + elements * (long long)size_of(type);
}

// Whether a leading dimension is large enough for its matrix; the library refuses smaller ones.
bool fits(cublasOperation_t op, int rows, int columns, int leading) {
    return leading >= std::max(1, op == CUBLAS_OP_N ? rows : columns);
}

// Whether `cublasGemmEx` supports these types together, of those that this crate or candle could ask for.
bool together(cudaDataType_t in, cudaDataType_t out, cublasComputeType_t compute) {
    bool half = in == CUDA_R_16F || in == CUDA_R_16BF;
    switch (compute) {
    case CUBLAS_COMPUTE_16F: return in == CUDA_R_16F && out == CUDA_R_16F;
    case CUBLAS_COMPUTE_32F: return half ? out == in || out == CUDA_R_32F : in == CUDA_R_32F && out == CUDA_R_32F;
    case CUBLAS_COMPUTE_32F_FAST_16F:
    case CUBLAS_COMPUTE_32F_FAST_16BF:
    case CUBLAS_COMPUTE_32F_FAST_TF32: return in == CUDA_R_32F && out == CUDA_R_32F;
    case CUBLAS_COMPUTE_64F: return in == CUDA_R_64F && out == CUDA_R_64F;
    default: return false;
    }
}

// For a batch given by pointers on the device, which the library cannot see, it assumes that each matrix is
// aligned to 16 bytes. This matters in single precision, where the library may use TF32 at any time.
bool aligned(const void *matrix, cudaDataType_t type) { return type != CUDA_R_32F || (uintptr_t)matrix % 16 == 0; }

} // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { *handle = new cublasContext(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) { handle->stream = (CUstream)stream; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                          const void *alpha, const void *a, cudaDataType_t at, int lda, long long sa,
                                          const void *b, cudaDataType_t bt, int ldb, long long sb, const void *beta, void *c,
                                          cudaDataType_t ct, int ldc, long long sc, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
    if (!fits(ta, m, k, lda) || !fits(tb, k, n, ldb) || ldc < std::max(1, m) || at != bt) return CUBLAS_STATUS_INVALID_VALUE;
    if (!together(at, ct, compute)) return CUBLAS_STATUS_NOT_SUPPORTED;
    double al = scalar(alpha, compute), be = scalar(beta, compute);
    count_product();
    enqueue(handle->stream, [=] {
        for (int i = 0; i < batch; i++)
            any_product(m, n, k, al, {shifted(a, at, i * sa), at, lda, ta}, {shifted(b, bt, i * sb), bt, ldb, tb}, be,
                        (void *)shifted(c, ct, i * sc), ct, ldc);
    });
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *alpha,
                            const void *a, cudaDataType_t at, int lda, const void *b, cudaDataType_t bt, int ldb, const void *beta,
                            void *c, cudaDataType_t ct, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, at, lda, 0, b, bt, ldb, 0, beta, c, ct, ldc, 0, 1, compute, algorithm);
}

cublasStatus_t cublasGemmBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void *alpha,
                                   const void *const *a, cudaDataType_t at, int lda, const void *const *b, cudaDataType_t bt, int ldb,
                                   const void *beta, void *const *c, cudaDataType_t ct, int ldc, int batch, cublasComputeType_t compute,
                                   cublasGemmAlgo_t) {
    if (!fits(ta, m, k, lda) || !fits(tb, k, n, ldb) || ldc < std::max(1, m) || at != bt) return CUBLAS_STATUS_INVALID_VALUE;
    if (!together(at, ct, compute)) return CUBLAS_STATUS_NOT_SUPPORTED;
    double al = scalar(alpha, compute), be = scalar(beta, compute);
    count_product();
    enqueue(handle->stream, [=] {
        for (int i = 0; i < batch; i++)
            if (!aligned(a[i], at) || !aligned(b[i], bt) || !aligned(c[i], ct))
                return fail(CUDA_ERROR_MISALIGNED_ADDRESS, "a batch of products has a matrix that does not begin at 16 bytes");
        for (int i = 0; i < batch; i++)
            any_product(m, n, k, al, {a[i], at, lda, ta}, {b[i], bt, ldb, tb}, be, c[i], ct, ldc);
    });
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                         const double *alpha, const double *a, int lda, long long sa, const double *b, int ldb,
                                         long long sb, const double *beta, double *c, int ldc, long long sc, int batch) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, CUDA_R_64F, lda, sa, b, CUDA_R_64F, ldb, sb, beta, c, CUDA_R_64F,
                                      ldc, sc, batch, CUBLAS_COMPUTE_64F, CUBLAS_GEMM_DEFAULT);
}

curandStatus_t curandCreateGenerator(curandGenerator_t *generator, curandRngType_t) { *generator = new curandGenerator_st(); return CURAND_STATUS_SUCCESS; }
curandStatus_t curandDestroyGenerator(curandGenerator_t generator) { delete generator; return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t generator, unsigned long long seed) { generator->engine.seed(seed); return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetGeneratorOffset(curandGenerator_t, unsigned long long) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetStream(curandGenerator_t generator, cudaStream_t stream) { generator->stream = (CUstream)stream; return CURAND_STATUS_SUCCESS; }

} // extern "C"

template <typename T, typename Law> static curandStatus_t generate(curandGenerator_t generator, T *xs, size_t count, Law law) {
    auto numbers = std::make_shared<std::vector<T>>(count);
    for (T &x : *numbers) x = law(generator->engine);
    enqueue(generator->stream, [=] { memcpy(xs, numbers->data(), count * sizeof(T)); });
    return CURAND_STATUS_SUCCESS;
}

extern "C" {
curandStatus_t curandGenerateUniform(curandGenerator_t g, float *xs, size_t n) { return generate(g, xs, n, std::uniform_real_distribution<float>()); }
curandStatus_t curandGenerateUniformDouble(curandGenerator_t g, double *xs, size_t n) { return generate(g, xs, n, std::uniform_real_distribution<double>()); }
curandStatus_t curandGenerateNormal(curandGenerator_t g, float *xs, size_t n, float mean, float std) { return generate(g, xs, n, std::normal_distribution<float>(mean, std)); }
curandStatus_t curandGenerateNormalDouble(curandGenerator_t g, double *xs, size_t n, double mean, double std) { return generate(g, xs, n, std::normal_distribution<double>(mean, std)); }
}
