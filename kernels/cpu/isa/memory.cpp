// Allocation and copies. Host memory is the device's memory.
#include <string.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

void copy_bytes(void* destination, const void* source, std::size_t bytes) {
  constexpr std::int64_t kPiece = 1 << 20;
  parallel_for(static_cast<std::int64_t>(bytes), kPiece, [=](std::int64_t begin, std::int64_t end) {
    memcpy(static_cast<char*>(destination) + begin, static_cast<const char*>(source) + begin,
           static_cast<std::size_t>(end - begin));
  });
}

}  // namespace

void* CpuBackend::allocate(std::size_t bytes) { return cpu::allocate(bytes); }
void CpuBackend::release(void* data, std::size_t) noexcept { cpu::release(data); }

void CpuBackend::copy_from_host(void* destination, const void* host, std::size_t bytes) {
  copy_bytes(destination, host, bytes);
}
void CpuBackend::copy_to_host(void* host, const void* source, std::size_t bytes) {
  copy_bytes(host, source, bytes);
}

void CpuBackend::copy(View out, ConstView in) {
  check_size("copy", "in", in.size, out.size);
  if (in.dtype != out.dtype) fail_type("copy", "in", in.dtype, out.dtype);
  if (out.data == in.data) return;
  if (out.data == nullptr && out.size > 0) fail_null("copy", "out");
  if (in.data == nullptr && in.size > 0) fail_null("copy", "in");
  copy_bytes(out.data, in.data, static_cast<std::size_t>(in.size) * size_of(in.dtype));
}

void CpuBackend::copy_rows(View out, ConstView in, std::int64_t rows, std::int64_t width,
                           std::int64_t in_row) {
  check_size("copy_rows", "in_row", in_row < width ? in_row : width, width);
  check_size("copy_rows", "out", out.size, rows * width);
  check_size("copy_rows", "in", in.size, rows > 0 ? (rows - 1) * in_row + width : 0);
  if (in.dtype != out.dtype) fail_type("copy_rows", "in", in.dtype, out.dtype);
  const std::size_t size = size_of(in.dtype), bytes = static_cast<std::size_t>(width) * size;
  for (std::int64_t r = 0; r < rows; ++r) {
    copy_bytes(static_cast<unsigned char*>(out.data) + static_cast<std::size_t>(r) * bytes,
               static_cast<const unsigned char*>(in.data) + static_cast<std::size_t>(r * in_row) * size,
               bytes);
  }
}

void CpuBackend::synchronize() {}

}  // namespace fathom::cpu::FATHOM_ISA
