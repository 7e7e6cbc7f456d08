// Records every kernel, copy and fill of a program with its begin and end, through CUPTI, without changing
// the program: a library that the CUDA driver loads.
//
//   CUDA_INJECTION64_PATH=build/cuda/bench/libfathom_kernel_times.so FATHOM_KERNEL_TIMES=times.tsv fathom
//   bench train ... python3 bench/kernel_table.py times.tsv
//
// Each line of the file: begin and end in nanoseconds, and the name, separated by tabs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include <cupti.h>

namespace {

struct Activity {
  std::uint64_t begin, end;
  std::string name;
};

// Buffers arrive on a thread of CUPTI's; the file is written when the program ends.
std::mutex mutex;
std::vector<Activity>& activities() {
  static auto* all = new std::vector<Activity>;  // outlives the program's other statics
  return *all;
}

void check(CUptiResult code, const char* what) {
  if (code == CUPTI_SUCCESS) return;
  const char* text = "";
  cuptiGetResultString(code, &text);
  std::fprintf(stderr, "kernel_times: %s: %s\n", what, text);
}

void buffer_requested(std::uint8_t** buffer, std::size_t* size, std::size_t* most_records) {
  constexpr std::size_t kBytes = 8U << 20, kAlignment = 8;
  *size = kBytes;
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(kAlignment, kBytes));
  *most_records = 0;
}

void buffer_completed(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* k = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
      activities().push_back({k->start, k->end, k->name != nullptr ? k->name : "?"});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* m = reinterpret_cast<const CUpti_ActivityMemcpy5*>(record);
      activities().push_back({m->start, m->end, "memcpy"});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const auto* m = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
      activities().push_back({m->start, m->end, "memset"});
    }
  }
  std::free(buffer);
}

void write_file() {
  check(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "flush");
  const char* path = std::getenv("FATHOM_KERNEL_TIMES");
  std::FILE* file = std::fopen(path != nullptr ? path : "kernel_times.tsv", "w");
  if (file == nullptr) {
    std::perror("kernel_times");
    return;
  }
  const std::lock_guard lock(mutex);
  for (const Activity& a : activities()) {
    std::fprintf(file, "%llu\t%llu\t%s\n", static_cast<unsigned long long>(a.begin),
                 static_cast<unsigned long long>(a.end), a.name.c_str());
  }
  std::fclose(file);
}

}  // namespace

extern "C" int InitializeInjection() {
  check(cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed), "callbacks");
  check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels");
  check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY), "copies");
  check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET), "fills");
  std::atexit(write_file);
  return 1;
}
