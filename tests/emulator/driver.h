// What the other libraries ask of the driver.
#pragma once

#include <cuda.h>

#include <functional>

// Gives a stream work, which waits for those who wait for the stream.
void enqueue(CUstream stream, std::function<void()> work);

void count_product();

// What is found wrong while work runs: as on a device, whoever waits is told, and nothing runs any more.
void fail(CUresult error, const char *what);
