// GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1): the columns of a matrix are rounded one after
// the other, and those not yet rounded take over what each has cost the layer's outputs. With H of hessian.h,
// damped to H + d mean(diag H) I, and U upper triangular, U^T U = H^-1, for each row, column c after column
// c:
//
//   q_c = round(w_c),   e = (w_c - q_c) / U_cc,   w_k -= e U_ck for k > c.
//
// Columns go in blocks of 128 (fewer, where a block would cut a group), behind which all later ones are
// updated at once. A group's scale is found when its turn comes, from the weights as they then are. In the
// order of activations (`act_order`: the largest H_cc first) a group's columns do not come together, so that
// its scale is found from the weights that were given. A column whose input was always zero (H_cc = 0) is
// rounded by itself; the paper's code makes it zero, but another text may still use it.
//
// Cost: columns^3 / 3 + rows columns^2 / 2 multiplications in double; beside the Hessian and the weights
// 8 columns^2 bytes, and 512 bytes a column for each thread. The same for any number of threads.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "infer/quant/hessian.h"
#include "infer/quant/quantized_matrix.h"
#include "infer/quant/round_to_nearest.h"

namespace fathom {

struct GptqOptions {
  double damping = 0.01;  // d
  bool act_order = false;
};

struct GptqResult {
  QuantizedMatrix matrix;  // where `failure` is empty
  std::string failure;     // why there is none, as the end of a sentence: "its Hessian has ..."
  double damping = 0;      // that was needed
};

/// `w` [rows][columns]; Clip::Weighted weighs by diag H. Where the damped H is not positive definite, the
/// damping is raised tenfold (to 1 % at least) up to three times. Failures: no token, elements of H that are
/// not finite, a negative diagonal, none positive definite, updates beyond all numbers.
/// UserError: as round_to_nearest(), and a damping that is negative or not finite. InternalError: sizes that
/// do not fit.
GptqResult gptq(std::span<const float> w, std::int64_t rows, std::int64_t columns, const WeightFormat& format,
                const Hessian& h, const GptqOptions& options = {});

enum class Quantizer : std::uint8_t { RoundToNearest, Gptq };

struct QuantizedLayer {
  QuantizedMatrix matrix;
  Quantizer by = Quantizer::RoundToNearest;
  std::string failure;  // of GPTQ, where there was a Hessian and it is not `by`
  double damping = 0;   // of GPTQ
};

/// By GPTQ where there is a Hessian from which it works, else each weight to the nearest. Errors: as gptq().
/// Clip::Weighted is Clip::LeastSquares where there is no Hessian or its diagonal is no importance.
QuantizedLayer quantize_matrix(std::span<const float> w, std::int64_t rows, std::int64_t columns,
                               const WeightFormat& format, const Hessian* h, const GptqOptions& options = {});

}  // namespace fathom
