// The part of libcuda that candle and this crate call, on the host. Work on a stream is deferred until the
// stream is waited for; freed memory is filled with NaN and reused by the next allocation of its stream; and
// calls are counted in a file that a test can read.

#include <cuda.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "driver.h"
#include "kernel.h"
#include "scheduler.h"

namespace {

const int devices = 2;
std::recursive_mutex lock;
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)

// The requests of a host thread so far, stored in this order in a file in the folder `EMULATOR_COUNTS`, which
// is named by the thread's id.
struct Counts { uint64_t launches, products, copies, memsets, synchronizations, allocations; };

Counts *counts() {
    static thread_local Counts *counts = [] {
        const char *folder = getenv("EMULATOR_COUNTS");
        std::string path = std::string(folder ? folder : "") + "/" + std::to_string(gettid());
        int file = folder ? open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600) : -1;
        if (file >= 0 && ftruncate(file, sizeof(Counts)) == 0) {
            void *map = mmap(nullptr, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
            if (map != MAP_FAILED) return (Counts *)map;
        }
        return new Counts();
    }();
    return counts;
}

// Whether to count without computing, so that counts of large models are cheap; all results are zero then.
bool idle() {
    static bool idle = getenv("EMULATOR_IDLE") != nullptr;
    return idle;
}

} // namespace

struct CUctx_st { int device; };

namespace {
CUctx_st contexts[devices] = {{0}, {1}};
thread_local CUcontext bound;
struct Span { size_t bytes; int device; };
std::map<uint64_t, Span> spans; // allocations by their first address
uint64_t used[devices], high[devices], reserved[devices], threshold[devices];
} // namespace

struct CUstream_st {
    int device;
    std::deque<std::function<void()>> queue;
    uint64_t done = 0; // items of the queue that have run
    std::unordered_map<size_t, std::vector<void *>> free;
    void run_to(uint64_t item) {
        while (done < item && !queue.empty()) {
            auto work = std::move(queue.front());
            queue.pop_front();
            done++;
            work();
        }
    }
    uint64_t last() const { return done + queue.size(); }
};

struct CUevent_st { CUstream stream = nullptr; uint64_t item = 0; };
struct CUmod_st { std::string source; };
struct CUfunc_st { const Kernel *kernel; const char *name; };

namespace {
std::vector<CUstream> streams;

int device() { return bound ? bound->device : 0; }

CUstream of(CUstream stream) {
    if (stream && stream != CU_STREAM_LEGACY && stream != CU_STREAM_PER_THREAD) return stream;
    static CUstream_st legacy[devices];
    legacy[device()].device = device();
    for (CUstream other : streams) // the legacy stream waits for all others
        if (other->device == device()) other->run_to(other->last());
    return &legacy[device()];
}

void wait_for(CUstream stream) { stream->run_to(stream->last()); }

// Fills memory with NaN in every precision.
void poison(void *memory, size_t bytes) { if (!idle()) memset(memory, 0xff, bytes); }

// Whether an argument is an address in another device's memory.
bool astray(const void *argument, size_t size, int device) {
    uint64_t address = 0;
    if (size != sizeof address) return false;
    memcpy(&address, argument, size);
    auto after = spans.upper_bound(address);
    if (after == spans.begin()) return false;
    auto span = *--after;
    return address < span.first + span.second.bytes && span.second.device != device;
}
CUresult failed = CUDA_SUCCESS; // the first error, which stays
} // namespace

void fail(CUresult error, const char *what) {
    LOCKED;
    fprintf(stderr, "emulated device: %s\n", what);
    if (failed == CUDA_SUCCESS) failed = error;
}

void enqueue(CUstream stream, std::function<void()> work) {
    LOCKED;
    of(stream)->queue.push_back(idle() ? [] {} : std::move(work));
}

void count_product() {
    LOCKED;
    counts()->products++;
}

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetExportTable(const void **, const CUuuid *) { return CUDA_ERROR_NOT_SUPPORTED; } // NVRTC asks for it but works without
CUresult cuGetErrorName(CUresult, const char **text) { *text = "CUDA_ERROR"; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    switch (error) {
    case CUDA_ERROR_ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
    case CUDA_ERROR_MISALIGNED_ADDRESS: *text = "misaligned address"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
    default: *text = "an error of the emulated device";
    }
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) { *count = devices; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal < devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice) { snprintf(name, size, "emulated"); return CUDA_SUCCESS; }
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice) { *bytes = (size_t)64 << 30; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 8; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 108; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    counts(); // so that the file exists before the first launch
    *context = &contexts[device];
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { bound = context; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = bound; return CUDA_SUCCESS; }
CUresult cuCtxSynchronize() {
    LOCKED;
    counts()->synchronizations++;
    of(nullptr);
    return failed;
}

CUresult cuStreamCreate(CUstream *stream, unsigned) {
    LOCKED;
    *stream = new CUstream_st{device(), {}};
    streams.push_back(*stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream stream) {
    LOCKED;
    wait_for(stream); // kept: other streams may still free into it
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
    LOCKED;
    counts()->synchronizations++;
    wait_for(of(stream));
    return failed;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    LOCKED;
    CUevent_st at = *event;
    if (at.stream) of(stream)->queue.push_back([=] { at.stream->run_to(at.item); });
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent *event, unsigned) { *event = new CUevent_st(); return CUDA_SUCCESS; }
CUresult cuEventDestroy(CUevent event) { delete event; return CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream stream) {
    LOCKED;
    *event = {of(stream), of(stream)->last()};
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    LOCKED;
    counts()->synchronizations++;
    if (event->stream) event->stream->run_to(event->item);
    return failed;
}
CUresult cuEventQuery(CUevent event) {
    LOCKED;
    return !event->stream || event->stream->done >= event->item ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
CUresult cuEventElapsedTime(float *ms, CUevent, CUevent) { *ms = 1.0f; return CUDA_SUCCESS; }

CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
    LOCKED;
    CUstream owner = of(stream);
    counts()->allocations++;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (failed != CUDA_SUCCESS) return failed;
    bytes = (bytes + 255) / 256 * 256;
    std::vector<void *> &free = owner->free[bytes];
    void *memory = free.empty() ? aligned_alloc(256, bytes) : free.back();
    if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
    if (free.empty()) {
        poison(memory, bytes);
        reserved[owner->device] += bytes;
    } else free.pop_back();
    *address = (CUdeviceptr)memory;
    spans[*address] = {bytes, owner->device};
    used[owner->device] += bytes;
    high[owner->device] = std::max(high[owner->device], used[owner->device]);
    return CUDA_SUCCESS;
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    LOCKED;
    if (!address) return CUDA_SUCCESS;
    auto span = spans.find(address);
    if (span == spans.end()) return CUDA_ERROR_INVALID_VALUE;
    size_t bytes = span->second.bytes;
    used[span->second.device] -= bytes;
    spans.erase(span);
    CUstream owner = of(stream);
    owner->free[bytes].push_back((void *)address);
    owner->queue.push_back([=] { poison((void *)address, bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) { return cuMemAllocAsync(address, bytes, nullptr); }
CUresult cuMemFree(CUdeviceptr address) { return cuMemFreeAsync(address, nullptr); }
CUresult cuMemGetInfo(size_t *free, size_t *total) {
    LOCKED;
    *total = (size_t)64 << 30;
    *free = *total - reserved[device()]; // freed memory stays in the pool
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t bytes, CUstream stream) {
    LOCKED;
    counts()->memsets++;
    enqueue(stream, [=] { memset((void *)address, value, bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    LOCKED;
    counts()->copies++;
    std::shared_ptr<char> copy(new char[bytes], std::default_delete<char[]>());
    memcpy(copy.get(), from, bytes);
    enqueue(stream, [=] { memcpy((void *)to, copy.get(), bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    LOCKED;
    counts()->copies++;
    counts()->synchronizations++; // pageable memory: the call returns when the copy is made
    wait_for(of(stream));
    if (idle()) memset(to, 0, bytes);
    else memcpy(to, (void *)from, bytes);
    return failed;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    LOCKED;
    counts()->copies++;
    enqueue(stream, [=] { memmove((void *)to, (void *)from, bytes); });
    return CUDA_SUCCESS;
}
CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
    return cuMemcpyDtoDAsync(to, from, bytes, stream);
}

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) { *pool = (CUmemoryPool)&contexts[device]; return CUDA_SUCCESS; }
CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    LOCKED;
    int device = ((CUcontext)pool)->device;
    if (attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) threshold[device] = *(cuuint64_t *)value;
    if (attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH || attribute == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH) high[device] = used[device];
    return CUDA_SUCCESS;
}
CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    LOCKED;
    int device = ((CUcontext)pool)->device;
    cuuint64_t *number = (cuuint64_t *)value;
    switch (attribute) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: *number = threshold[device]; break;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH: *number = high[device]; break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: *number = reserved[device]; break;
    default: *number = used[device];
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = new CUmod_st{(const char *)image};
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    LOCKED;
    auto kernel = kernels().find(name);
    bool there = module->source.find(std::string(".entry ") + name + "(") != std::string::npos;
    if (!there || kernel == kernels().end()) {
        fprintf(stderr, "emulated device: no kernel %s\n", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    static std::unordered_map<const Kernel *, CUfunc_st> functions;
    *function = &functions.emplace(&kernel->second, CUfunc_st{&kernel->second, kernel->first.c_str()}).first->second;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned, CUstream stream, void **arguments, void **) {
    LOCKED;
    counts()->launches++;
    if (failed != CUDA_SUCCESS) return failed;
    if (!gx || !gy || !gz || !bx || !by || !bz || gy > 65535 || gz > 65535 || bx * by * bz > 1024) return CUDA_ERROR_INVALID_VALUE;
    const Kernel *kernel = function->kernel;
    int device = of(stream)->device;
    std::vector<std::vector<char>> values;
    for (size_t i = 0; i < kernel->sizes.size(); i++) {
        const char *value = (const char *)arguments[i];
        if (astray(value, kernel->sizes[i], device)) return CUDA_ERROR_ILLEGAL_ADDRESS;
        values.emplace_back(value, value + kernel->sizes[i]);
    }
    enqueue(stream, [=]() mutable {
        std::vector<void *> pointers;
        for (auto &value : values) pointers.push_back(value.data());
        run_grid({gx, gy, gz}, {bx, by, bz}, [&] { kernel->call(pointers.data()); });
    });
    return CUDA_SUCCESS;
}

} // extern "C"
