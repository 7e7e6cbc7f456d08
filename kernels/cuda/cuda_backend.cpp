// The device itself: stream, memory, copies between host and device, captured work.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <thread>

#include <fmt/format.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cudnn_attention.h"
#include "kernels/cuda/device_query.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/make.h"

namespace fathom::cuda {

namespace {

// Host memory is pageable, and the device reads it through pinned buffers of this size, used in turn. A copy
// waits for the one that had its buffer before, and with that for all that precedes that one: so many that
// the copies of a training step that is launched behind another (four a micro-batch, and one or two) do not
// come round to the other's, up to 31 micro-batches of 65,536 tokens.
constexpr std::size_t kStagingBytes = 256U << 10;
constexpr std::size_t kStagingBuffers = 128;

class CudaGraph final : public CapturedWork {
 public:
  CudaGraph(cudaGraph_t graph, cudaStream_t stream, unsigned flags) : stream_(stream) {
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph, flags), "capture");
    executable_.reset(executable);
  }
  void launch() override { check(cudaGraphLaunch(executable_.get(), stream_), "captured step"); }

 private:
  cudaStream_t stream_;
  GraphExecHandle executable_;
};

class CudaReadback final : public Readback {
 public:
  CudaReadback(std::size_t bytes, CudaBackend& backend)
      : backend_(backend),
        bytes_(bytes),
        host_(make_pinned_memory("readback", std::max<std::size_t>(bytes, 1))),
        arrived_(make_event("readback", cudaEventDisableTiming)) {}
  ~CudaReadback() override { cudaEventSynchronize(arrived_.get()); }  // the device may still write there
  void begin(const void* source) override {
    check(cudaMemcpyAsync(host_.get(), source, bytes_, cudaMemcpyDeviceToHost, backend_.stream()),
          "readback");
    check(cudaEventRecord(arrived_.get(), backend_.stream()), "readback");
  }
  const void* wait() override {
    backend_.wait_for(arrived_.get(), "readback");
    return host_.get();
  }

 private:
  CudaBackend& backend_;
  std::size_t bytes_;
  PinnedMemory host_;
  EventHandle arrived_;
};

}  // namespace

CudaBackend::CudaBackend(const BackendOptions& options, int device) : options_(options), device_(device) {
  const DeviceReport report = query_devices();
  if (device < 0 || device >= static_cast<int>(report.devices.size())) {
    throw UserError(fmt::format("There is no GPU {}: this machine shows {}.", device, report.devices.size()),
                    "fathom doctor lists them; CUDA_VISIBLE_DEVICES hides some.");
  }
  const Device& found = report.devices[static_cast<std::size_t>(device)];
  prove_device(found);
  name_ = found.name;
  multiprocessors_ = found.multiprocessors;
  memory_bytes_ = found.memory_bytes;
  const char* blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
  launches_block_ = blocking != nullptr && std::string_view(blocking) != "0" && *blocking != '\0';
  check(cudaSetDevice(device), "cuda");
  stream_owner_ = make_stream("cuda");
  stream_ = stream_owner_.get();
  reached_ = make_event("cuda", cudaEventDisableTiming);
  for (std::size_t i = 0; i < kStagingBuffers; ++i) {
    pinned_.push_back(make_pinned_memory("cuda", kStagingBytes));
    pinned_free_.push_back(make_event("cuda", cudaEventDisableTiming));
  }
  gemm_ = std::make_unique<Gemm>(stream_, name_, options.deterministic);
  cudnn_ = CudnnAttention::open(stream_, options.deterministic);
}

// Errors cannot be thrown from here, and a device that failed was reported by the op that met it.
CudaBackend::~CudaBackend() {
  cudaStreamSynchronize(stream_);
  for (void* block : scratch_.blocks()) cudaFree(block);
}

std::string CudaBackend::description() const {
  return fmt::format("{}{}{}", name_, cudnn_ ? ", cuDNN " + cudnn_->version() : ", without cuDNN",
                     options_.invariant       ? ", row-invariant"
                     : options_.deterministic ? ", deterministic"
                                              : "");
}

void* CudaBackend::allocate(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t code = cudaMalloc(&data, std::max<std::size_t>(bytes, 1));
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it was reported; the next check is not to find it
    throw std::bad_alloc();
  }
  check(code, "allocate");
  return data;
}

std::int64_t CudaBackend::free_memory_bytes() const {
  std::size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess) return static_cast<std::int64_t>(free);
  cudaGetLastError();  // unknown is an answer; the next check is not to find it
  return 0;
}

std::int64_t CudaBackend::workspace_bytes() const {
  return static_cast<std::int64_t>(scratch_.held_bytes() + Gemm::kWorkspaceBytes);
}

void CudaBackend::release(void* data, std::size_t) noexcept {
  // A stream that is being captured cannot be waited for: asking spoils the capture. cudaFree waits by
  // itself.
  if (!capturing_) cudaStreamSynchronize(stream_);
  cudaFree(data);
}

void CudaBackend::copy_from_host(void* destination, const void* host, std::size_t bytes) {
  const auto* from = static_cast<const std::byte*>(host);
  auto* to = static_cast<std::byte*>(destination);
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t part = std::min(kStagingBytes, bytes - done);
    const std::size_t i = next_pinned_++ % kStagingBuffers;
    wait_for(pinned_free_[i].get(), "copy_from_host");
    std::memcpy(pinned_[i].get(), from + done, part);
    check(cudaMemcpyAsync(to + done, pinned_[i].get(), part, cudaMemcpyHostToDevice, stream_),
          "copy_from_host");
    check(cudaEventRecord(pinned_free_[i].get(), stream_), "copy_from_host");
    done += part;
  }
}

void CudaBackend::copy_to_host(void* host, const void* source, std::size_t bytes) {
  if (bytes == 0) return;
  // A copy to memory that is not pinned waits within the driver, where nobody is looked after.
  if (while_waiting_) synchronize();
  check(cudaMemcpyAsync(host, source, bytes, cudaMemcpyDeviceToHost, stream_), "copy_to_host");
  synchronize();
}

std::unique_ptr<Readback> CudaBackend::make_readback(std::size_t bytes) {
  return std::make_unique<CudaReadback>(bytes, *this);
}

void CudaBackend::copy(View out, ConstView in) {
  if (out.size != in.size) fail("copy", "out", out.size, in.size);
  if (out.dtype != in.dtype) fail_type("copy", "out", out.dtype, in.dtype);
  if (out.size == 0) return;
  check(cudaMemcpyAsync(out.data, in.data, static_cast<std::size_t>(out.size) * size_of(out.dtype),
                        cudaMemcpyDeviceToDevice, stream_),
        "copy");
}

void CudaBackend::copy_rows(View out, ConstView in, std::int64_t rows, std::int64_t width,
                            std::int64_t in_row) {
  const std::int64_t needed = rows > 0 ? (rows - 1) * in_row + width : 0;
  if (in_row < width) fail("copy_rows", "in_row", in_row, width);
  if (out.size != rows * width) fail("copy_rows", "out", out.size, rows * width);
  if (in.size != needed) fail("copy_rows", "in", in.size, needed);
  if (out.dtype != in.dtype) fail_type("copy_rows", "out", out.dtype, in.dtype);
  if (out.size == 0) return;
  const auto bytes = [&](std::int64_t n) { return static_cast<std::size_t>(n) * size_of(in.dtype); };
  check(cudaMemcpy2DAsync(out.data, bytes(width), in.data, bytes(in_row), bytes(width),
                          static_cast<std::size_t>(rows), cudaMemcpyDeviceToDevice, stream_),
        "copy_rows");
}

void CudaBackend::synchronize() {
  if (!while_waiting_) return check(cudaStreamSynchronize(stream_), "synchronize");
  check(cudaEventRecord(reached_.get(), stream_), "synchronize");
  wait_for(reached_.get(), "synchronize");
}

void CudaBackend::wait_for(cudaEvent_t event, const char* op) {
  if (!while_waiting_) return check(cudaEventSynchronize(event), op);
  const auto began = std::chrono::steady_clock::now();
  for (int polls = 0;; ++polls) {
    const cudaError_t code = cudaEventQuery(event);
    if (code == cudaSuccess) return;
    if (code != cudaErrorNotReady) check(code, op);
    cudaGetLastError();  // not ready is no error; the next check is not to find it
    while_waiting_(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    // The longer it waits, the more it leaves the processor to others: data loaders, other ranks.
    constexpr int kSpins = 200, kYields = 2000;
    if (polls > kYields) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    } else if (polls > kSpins) {
      std::this_thread::yield();
    }
  }
}

void CudaBackend::begin_capture() {
  // Relaxed: memory may still be asked for while ops are recorded.
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capture");
  capturing_ = true;
}

std::unique_ptr<CapturedWork> CudaBackend::end_capture() {
  cudaGraph_t graph = nullptr;
  capturing_ = false;
  check(cudaStreamEndCapture(stream_, &graph), "capture");
  const GraphHandle owned(graph);
  // What another stream brought in, between processes' devices, keeps that stream's priority.
  const unsigned flags = while_waiting_ ? cudaGraphInstantiateFlagUseNodePriority : 0;
  return std::make_unique<CudaGraph>(owned.get(), stream_, flags);
}

void CudaBackend::abandon_capture() noexcept {
  if (!capturing_) return;
  capturing_ = false;
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream_, &graph);
  const GraphHandle owned(graph);
  cudaGetLastError();
}

void* CudaBackend::scratch(std::size_t bytes) {
  return scratch_.get(bytes, [this](std::size_t n) {
    try {
      return allocate_own(*this, n);
    } catch (const std::bad_alloc&) {
      const auto mib = [](auto b) { return static_cast<double>(b) / (1 << 20); };
      fail_memory(
          fmt::format("{:.0f} MiB of an op's own beside the {:.0f} MiB that ops share ({:.0f} MiB are free)",
                      mib(n), mib(workspace_bytes()), mib(free_memory_bytes()))
              .c_str());
    }
  });
}

}  // namespace fathom::cuda

namespace fathom {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options, int device) {
  return std::make_unique<cuda::CudaBackend>(options, device);
}

}  // namespace fathom
