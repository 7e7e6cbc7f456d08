// The Cholesky factor of a matrix's inverse, which is what GPTQ needs of a Hessian.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

/// Puts U, upper triangular and zero below, in the place of the symmetric a [n][n] such that a^-1 = U^T U.
/// The inverse itself is not made: with a = R R^T, R upper triangular (Cholesky's way from the last row up),
/// it is R^-T R^-1, so U = R^-1. n^3 / 3 multiplications, in place, the same for any number of threads.
/// False: a is not positive definite, and what is in its place means nothing.
bool inverse_cholesky(std::vector<double>& a, std::int64_t n);

}  // namespace fathom
