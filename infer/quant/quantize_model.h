// A model whose products have weights of few bits, from one that has numbers.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "infer/quant/quantized_matrix.h"
#include "src/model/transformer.h"

namespace fathom {

/// A row-major matrix [rows, columns], the whole of a parameter or one expert's part of it, and how it is to
/// be cut.
struct MatrixToQuantize {
  std::string parameter;
  std::int64_t expert = 0;  // 0 where there are none
  std::span<const float> values;
  std::int64_t rows = 0;
  PackedFormat format;
};
using MatrixQuantizer = std::function<QuantizedMatrix(const MatrixToQuantize&)>;

struct QuantizedModel {
  std::unique_ptr<Transformer> model;
  /// By kind of product: the root of the squared errors' sum over that of the weights' squares.
  std::map<std::string, double> relative_error;
};

/// The same in steps, for those who look at what is quantized so far.
class ModelQuantizer {
 public:
  /// `model` has its masters, and outlives it. All but what `quantization` names is copied. UserError: groups
  /// that do not divide a matrix's rows.
  ModelQuantizer(Context& c, const Transformer& model, const Quantization& quantization);
  ~ModelQuantizer();
  ModelQuantizer(const ModelQuantizer&) = delete;
  ModelQuantizer& operator=(const ModelQuantizer&) = delete;

  /// Names of the parameters of few bits, in the order in which a forward pass reads them.
  std::vector<std::string> parameters() const;
  /// One of them. UserError: weights that no scale holds (not finite). InternalError: the quantizer gave
  /// another shape.
  void quantize(const std::string& parameter, const MatrixQuantizer& quantize);
  /// Parameters of few bits have no value until they are quantized.
  Transformer& model();
  /// Of a model whose parameters are all quantized. It is empty afterwards.
  QuantizedModel finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// `model` has its masters. All but what `quantization` names is copied. UserError: groups that do not divide
/// a matrix's rows, or weights that no scale holds (not finite). InternalError: the quantizer gave another
/// shape.
QuantizedModel quantize_model(Context& c, const Transformer& model, const Quantization& quantization,
                              const MatrixQuantizer& quantize);

}  // namespace fathom
