// The functions of the driver that the other emulated libraries use.
#pragma once

#include <cuda.h>

#include <functional>

// Queues work on a stream; it runs when the stream is waited for.
void enqueue(CUstream stream, std::function<void()> work);

void count_product();

// Reports an error of running work: as on a device, later waits return it, and nothing runs any more.
void fail(CUresult error, const char *what);
