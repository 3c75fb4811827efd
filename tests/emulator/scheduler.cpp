// Runs a kernel's blocks one after another, and a block's threads as fibers that switch at barriers.

#include "kernel.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#include "scheduler.h"

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}

Index threadIdx, blockIdx, blockDim, gridDim;
char warp_values[1024][16];

namespace {

enum class Wait { nothing, warp, block, work };

const size_t stack_bytes = 256 << 10;
const unsigned warp_threads = 32;

struct Fiber {
    jmp_buf place;
    ucontext_t start;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    unsigned thread = 0;
    Wait wait = Wait::work;
    bool begun = false;
};

std::vector<std::unique_ptr<Fiber>> fibers; // reused for the next block
Fiber *current;
jmp_buf scheduler;
ucontext_t unused;
const std::function<void()> *body;
unsigned next_thread, threads;

void set_thread(unsigned thread) {
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

void yield(Wait wait) {
    current->wait = wait;
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

// Runs thread after thread; a thread that waits keeps this fiber, and the scheduler starts another for the
// rest.
void work() {
    for (;;) {
        while (next_thread < threads) {
            current->thread = next_thread++;
            set_thread(current->thread);
            (*body)();
        }
        yield(Wait::work);
    }
}

void resume(Fiber &fiber) {
    current = &fiber;
    fiber.wait = Wait::nothing;
    set_thread(fiber.thread);
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.start, work, 0);
    swapcontext(&unused, &fiber.start);
}

void run_block() {
    next_thread = 0;
    size_t live = 0;
    while (next_thread < threads) {
        if (live == fibers.size()) fibers.push_back(std::make_unique<Fiber>());
        resume(*fibers[live]);
        if (fibers[live]->wait != Wait::work) live++;
    }
    // Fibers are in the order of their threads. A warp continues when all its unfinished threads wait at the
    // warp's barrier; a block likewise.
    for (bool waiting = live > 0; waiting;) {
        bool gone_on = false;
        unsigned at_block = 0, unfinished = 0;
        for (size_t first = 0; first < live;) {
            size_t last = first;
            unsigned warp = fibers[first]->thread / warp_threads, at_warp = 0, of_warp = 0;
            for (; last < live && fibers[last]->thread / warp_threads == warp; last++) {
                of_warp += fibers[last]->wait != Wait::work;
                at_warp += fibers[last]->wait == Wait::warp;
                at_block += fibers[last]->wait == Wait::block;
            }
            unfinished += of_warp;
            if (at_warp > 0 && at_warp == of_warp) {
                for (size_t i = first; i < last; i++)
                    if (fibers[i]->wait == Wait::warp) resume(*fibers[i]);
                gone_on = true;
            }
            first = last;
        }
        waiting = unfinished > 0;
        if (waiting && !gone_on) {
            if (at_block != unfinished) {
                fprintf(stderr, "a kernel's threads wait for each other: %u of %u at the block's barrier\n", at_block, unfinished);
                abort();
            }
            for (size_t i = 0; i < live; i++)
                if (fibers[i]->wait == Wait::block) resume(*fibers[i]);
        }
    }
}

} // namespace

void __syncthreads() { yield(Wait::block); }
void wait_for_warp() { yield(Wait::warp); }

void run_grid(Index grid, Index block, const std::function<void()> &kernel) {
    gridDim = grid;
    blockDim = block;
    threads = block.x * block.y * block.z;
    body = &kernel;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) run_block();
}
