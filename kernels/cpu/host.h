// Compiled once, for every processor: what the ISA-specific copies of the backend need from the standard
// library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/dtype.h"

namespace fathom::cpu {

/// InternalError "[op] what: got given, expected expected".
[[noreturn]] void fail(const char* op, const char* what, std::int64_t given, std::int64_t expected);
[[noreturn]] void fail_dtype(const char* op, DType given);
/// InternalError for a view of another element type than the op's, and for a view without data.
[[noreturn]] void fail_type(const char* op, const char* what, DType given, DType expected);
[[noreturn]] void fail_null(const char* op, const char* what);

/// Checks that a view holds `expected` elements.
inline void check_size(const char* op, const char* what, std::int64_t given, std::int64_t expected) {
  if (given != expected) fail(op, what, given, expected);
}

/// The number of threads that parallel_for uses; set once, by make_cpu_backend or by who opens a GPU.
void set_threads(int threads);
int threads();
bool in_parallel();

/// Runs body(context, begin, end) over [0, n) cut into pieces of `grain`; pieces go to threads in a fixed
/// way. Piece boundaries depend on n and grain only, so that a reduction kept by piece does not depend on the
/// threads.
using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
void run_pieces(std::int64_t n, std::int64_t grain, RangeBody body, void* context);

/// "CPU, AVX-512, 2 threads" for the instruction set called `isa`.
std::string describe(const char* isa, int threads);

void* allocate(std::size_t bytes);
void release(void* data) noexcept;

}  // namespace fathom::cpu
