// What the other libraries ask of the driver.
#pragma once

#include <cuda.h>

#include <functional>

// Gives a stream work, which waits for those who wait for the stream.
void enqueue(CUstream stream, std::function<void()> work);

void count_product();
