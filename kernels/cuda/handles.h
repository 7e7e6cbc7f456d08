// What CUDA creates, owned: each destroys what it holds, also where a constructor throws half-way.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

#include <cuda_runtime_api.h>

#include "kernels/cuda/check.h"

namespace fathom::cuda {

struct HandleDeleter {
  void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
  void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
  void operator()(cudaGraph_t graph) const noexcept { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t executable) const noexcept { cudaGraphExecDestroy(executable); }
};
using StreamHandle = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, HandleDeleter>;
using EventHandle = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, HandleDeleter>;
using GraphHandle = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, HandleDeleter>;
using GraphExecHandle = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, HandleDeleter>;

struct DeviceMemoryDeleter {
  void operator()(void* data) const noexcept { cudaFree(data); }
};
struct PinnedMemoryDeleter {
  void operator()(void* data) const noexcept { cudaFreeHost(data); }
};
using DeviceMemory = std::unique_ptr<void, DeviceMemoryDeleter>;
using PinnedMemory = std::unique_ptr<void, PinnedMemoryDeleter>;

// The errors are check()'s, in the name of `op`.

inline StreamHandle make_stream(const char* op) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), op);
  return StreamHandle(stream);
}

inline EventHandle make_event(const char* op, unsigned flags = cudaEventDefault) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, flags), op);
  return EventHandle(event);
}

inline DeviceMemory make_device_memory(const char* op, std::size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes), op);
  return DeviceMemory(data);
}

inline PinnedMemory make_pinned_memory(const char* op, std::size_t bytes) {
  void* data = nullptr;
  check(cudaMallocHost(&data, bytes), op);
  return PinnedMemory(data);
}

}  // namespace fathom::cuda
