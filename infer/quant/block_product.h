// The one product that Hessians, their factors and GPTQ's updates are made of, in double.
#pragma once

#include <cstdint>

namespace fathom {

enum class Sign : std::uint8_t { Add, Subtract };

/// c [m][n] += or -= a^T b, a [k][m] and b [k][n], rows `c_row`, `a_row`, `b_row` apart. Each element is a
/// sum in the order of k, by runs of 128: it does not depend on m, n or the place of the element in them, so
/// that matrices may be cut into tiles anyhow. Runs on the calling thread, with the widest vectors that the
/// processor has and FATHOM_ISA (make_cpu_backend) allows; other vectors may round differently.
void block_product(Sign sign, double* c, std::int64_t c_row, const double* a, std::int64_t a_row,
                   const double* b, std::int64_t b_row, std::int64_t m, std::int64_t n, std::int64_t k);

}  // namespace fathom
