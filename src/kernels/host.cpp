// The kernels as C++ on the host, for the tests: a thread of the system for each of a block's, which follow each other.
// Reads one request of 64-bit words (integers, or doubles) from standard input and writes the answer's words.

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

static const unsigned block_threads = 32;
static thread_local unsigned thread_index, block_index, block_row;
static unsigned row_blocks, block_rows;
static pthread_barrier_t barrier;

// The library's own writes a sign that all threads share.
static double lgamma_alone(double x) {
    int sign;
    return lgamma_r(x, &sign);
}
#define lgamma lgamma_alone

#define HOST_DIALECT
#define KERNEL static void
#define DEVICE static inline
#define SHARED static
#define BARRIER pthread_barrier_wait(&barrier);
#define FENCE // blocks follow each other
#define COUNT(counter) __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL)
#define THREAD thread_index
#define THREADS block_threads
#define BLOCK block_index
#define BLOCKS row_blocks
#define BLOCK_ROW block_row
#define BLOCK_ROWS block_rows

#include "dialect.cu"
#include "noise.cu"
#include "gamma.cu"
#include "blocks.cu"
#include "norm.cu"
#include "draw.cu"
#include "divergence.cu"
#include "energy.cu"
#include "update.cu"
#include "attention.cu"
#include "loss.cu"
#include "gather.cu"
#include "activation.cu"
#include "linear.cu"

// Calls a kernel from all threads of all blocks; none begins a block before all have left the last.
template <typename Call> static void launch_rows(unsigned rows, unsigned blocks, Call call) {
    std::vector<std::thread> team;
    row_blocks = blocks, block_rows = rows;
    pthread_barrier_init(&barrier, nullptr, THREADS);
    for (unsigned thread = 0; thread < THREADS; thread++) team.emplace_back([=] {
        thread_index = thread;
        for (block_row = 0; block_row < rows; block_row++)
            for (block_index = 0; block_index < blocks; block_index++) {
                call();
                BARRIER
            }
    });
    for (std::thread &thread : team) thread.join();
    pthread_barrier_destroy(&barrier);
}

#define LAUNCH_ROWS(rows, blocks, call) launch_rows(rows, blocks, [=] { call; })
#define LAUNCH(blocks, call) LAUNCH_ROWS(1, blocks, call)

static uint64_t word(void) {
    uint64_t x;
    if (fread(&x, sizeof x, 1, stdin) != 1) exit(2);
    return x;
}

static double number(void) {
    uint64_t bits = word();
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Memory for numbers of up to eight bytes; what is read before it is written is NaN.
struct Room {
    void *memory;
    template <typename T> operator T *() const { return (T *)memory; }
};

static Room room(size_t count) {
    void *memory = malloc(8 * (count + 1));
    memset(memory, 0xff, 8 * (count + 1));
    return {memory};
}

static double *doubles(size_t count) {
    double *xs = room(count);
    for (size_t i = 0; i < count; i++) xs[i] = number();
    return xs;
}

static float *floats(size_t count) {
    float *xs = room(count);
    for (size_t i = 0; i < count; i++) xs[i] = (float)number();
    return xs;
}

static void put(double x) { fwrite(&x, sizeof x, 1, stdout); }
static void put_doubles(const double *xs, size_t count) { for (size_t i = 0; i < count; i++) put(xs[i]); }
static void put_floats(const float *xs, size_t count) { for (size_t i = 0; i < count; i++) put(xs[i]); }

static void noise(void) {
    u64 key = word(), at = word(), count = word();
    for (u64 i = 0; i < count; i++) put(uniform(key, at, i));
    for (u64 i = 0; i < count; i++) put(normal(key, at, i));
    for (u64 i = 0; i < count; i++) put(normal_double(key, at, i));
}

static void quantiles(void) {
    u64 count = word();
    for (u64 i = 0; i < count; i++) {
        double a = number();
        Dual q = gamma_quantile(a, number());
        put(q.value);
        put(q.slope);
    }
}

static void family(void) {
    u32 derivative = word(), count = word(), blocks = (count + THREADS - 1) / THREADS;
    double *xs = doubles(count), *ys = room(count);
    float *narrow = room(count), *rounded = room(count);
    for (u32 i = 0; i < count; i++) narrow[i] = (float)xs[i];
    LAUNCH(blocks, gamma_family_f64(derivative, count, xs, ys));
    LAUNCH(blocks, gamma_family_f32(derivative, count, narrow, rounded));
    put_doubles(ys, count);
    put_floats(rounded, count);
}

static void optimizer(void) {
    u32 tensors = word(), blocks = word();
    float factor = number(), beta1 = number(), rest1 = number(), beta2 = number(), rest2 = number(), eps = number();
    Update *updates = room(6 * tensors);
    Span *spans = room(2 * tensors);
    for (u32 i = 0; i < tensors; i++) {
        Update *u = &updates[i];
        u->count = word();
        u->keep = number(), u->rate = number(), u->inverse = number();
        u->value = floats(u->count), u->first = floats(u->count), u->second = floats(u->count);
        u->grad = floats(u->count);
        spans[i] = (Span){u->grad, u->count};
    }
    double *sums = room(tensors * blocks), *total = room(1);
    u32 done = 0;
    LAUNCH_ROWS(tensors, blocks, adamw(updates, factor, beta1, rest1, beta2, rest2, eps));
    u32 *counter = &done;
    // Twice: the counter of blocks is zero again, or nobody writes what was wiped out in between.
    for (int time = 0; time < 2; time++) {
        *total = -1.0;
        LAUNCH_ROWS(tensors, blocks, sums_of_squares(spans, sums, counter, total));
    }
    for (u32 i = 0; i < tensors; i++) {
        put_floats(updates[i].value, updates[i].count);
        put_floats(updates[i].first, updates[i].count);
        put_floats(updates[i].second, updates[i].count);
    }
    put_doubles(total, 1);
    Scaling *scalings = room(3 * tensors);
    for (u32 i = 0; i < tensors; i++) scalings[i] = (Scaling){updates[i].grad, room(updates[i].count), updates[i].count};
    LAUNCH_ROWS(tensors, blocks, scale_all(scalings, beta1));
    for (u32 i = 0; i < tensors; i++) put_floats(scalings[i].to, scalings[i].count);
    Sum *pairs = room(4 * tensors);
    for (u32 i = 0; i < tensors; i++) {
        pairs[i] = (Sum){scalings[i].from, scalings[i].to, room(scalings[i].count), scalings[i].count};
    }
    LAUNCH_ROWS(tensors, blocks, sum_all(pairs));
    for (u32 i = 0; i < tensors; i++) put_floats(pairs[i].to, pairs[i].count);
}

// Numbers in single precision or, narrow, as bf16.
static void *storage(size_t count, u32 narrow) {
    void *xs = room(count);
    for (size_t i = 0; i < count; i++) store(xs, i, narrow, (float)number());
    return xs;
}

static void put_storage(const void *xs, size_t count, u32 narrow) {
    for (size_t i = 0; i < count; i++) put(load(xs, i, narrow));
}

static void norm(void) {
    u32 rows = word(), dim = word(), narrow = word(), centred = word(), added = word(), biased = word();
    float eps = number();
    void *xs = storage(rows * dim, narrow), *residual = storage(rows * dim, narrow);
    void *weight = storage(dim, narrow), *bias = storage(dim, narrow), *grad = storage(rows * dim, narrow);
    void *ys = room(rows * dim), *dxs = room(rows * dim);
    LAUNCH(rows, norm_forward(dim, narrow, centred, eps, added, biased, xs, residual, weight, bias, ys));
    LAUNCH(rows, norm_backward(dim, narrow, centred, eps, added, xs, residual, weight, grad, dxs));
    put_storage(ys, rows * dim, narrow);
    put_storage(dxs, rows * dim, narrow);
}

static void dropout(void) {
    u64 key = word(), at = word();
    u32 count = word(), threshold = word(), blocks = ((count + 3) / 4 + THREADS - 1) / THREADS;
    unsigned char *keep = room(count);
    float *ones = room(count), *ys = room(count);
    for (u32 i = 0; i < count + 1; i++) ones[i] = 1.0f;
    LAUNCH(blocks, keep_mask(count, threshold, key, at, keep));
    LAUNCH(blocks, dropout_apply(count, 0, threshold, key, at, 2.0f, ones, ys));
    for (u32 i = 0; i < count + 1; i++) put(keep[i]); // the one behind the last is not written
    put_floats(ys, count + 1);
}

#include "host_attention.cpp"
#include "host_loss.cpp"
#include "host_activation.cpp"
#include "host_linear.cpp"
#include "host_draws.cpp"
#include "host_divergence.cpp"
#include "host_energy.cpp"

int main(void) {
    switch (word()) {
    case 1: noise(); break;
    case 2: quantiles(); break;
    case 3: family(); break;
    case 4: optimizer(); break;
    case 5: dropout(); break;
    case 6: norm(); break;
    case 20: attention(); break;
    case 21: cross_entropy(); break;
    case 22: rows_moved(); break;
    case 30: gelu(); break;
    case 31: silu_mul(); break;
    case 32: rotary(); break;
    case 33: bias(); break;
    case 34: factors(); break;
    case 35: product(); break;
    case 36: joined(); break;
    case 40: draws(); break;
    case 41: regularizer(); break;
    case 42: energies(); break;
    default: return 3;
    }
    return 0;
}
