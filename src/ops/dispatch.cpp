#include "src/ops/dispatch.h"

#include "src/ops/check.h"

namespace fathom::ops {

Dispatch empty_dispatch(Context& c, const char* op, const Tensor& choices, std::int64_t experts,
                        std::int64_t rows, std::int64_t slots) {
  expect_matrix(c, op, "choices", choices);
  if (choices.dim(0) < experts || choices.dim(1) != rows) fail(c, op, "choices", choices, {experts, rows});
  return {{rows, experts, slots, 0},
          c.empty({experts * slots}, DType::I32),
          c.empty({experts, rows}, DType::I32)};
}

}  // namespace fathom::ops
