// The product of the row-invariant mode.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace fathom::cuda {

/// y = x W^T where each element is one sum over k in ascending order, whatever the number of rows. One
/// product: s.batch is not read. Out: T or float.
template <typename T, typename Out>
void linear_invariant(Out* y, const T* x, const T* w, const LinearShape& s, cudaStream_t stream);

}  // namespace fathom::cuda
