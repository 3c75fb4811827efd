// What the driver needs of the kernels: their table, and launches.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct Index;

// A kernel as its launch needs it: the sizes of its arguments, and a function that calls it with pointers to
// them.
struct Kernel {
    std::vector<size_t> sizes;
    std::function<void(void **)> call;
};

// All kernels by name.
std::map<std::string, Kernel> &kernels();

void run_grid(Index grid, Index block, const std::function<void()> &kernel);

template <typename... Args, size_t... I>
Kernel kernel_of(void (*function)(Args...), std::index_sequence<I...>) {
    return {{sizeof(Args)...}, [=](void **args) { function(*(Args *)args[I]...); }};
}

template <typename... Args> bool add_kernel(const char *name, void (*function)(Args...)) {
    return kernels().emplace(name, kernel_of(function, std::index_sequence_for<Args...>{})).second;
}
