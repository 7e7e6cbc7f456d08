// The weights of a model in exchange: what Fathom holds as one matrix, others hold as several. Private to
// src/model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "src/config/config.h"
#include "src/io/safetensors.h"
#include "src/nn/parameters.h"

namespace fathom {

/// One of the tensors that a parameter is, one after the other along its first dimension.
struct ExchangePart {
  std::string name;
  std::vector<std::int64_t> shape;
};

/// qkv_proj is q_proj, k_proj and v_proj; gate_up_proj is gate_proj and up_proj; experts stand one by one;
/// all else is itself.
std::vector<ExchangePart> exchange_parts(const ParameterSpec& spec, const ModelConfig& model);

/// The bytes of fp32 values as F32 or, rounded to nearest even, as BF16.
std::vector<std::byte> to_exchange(std::span<const float> values, DType dtype);
/// The values of a tensor of any floating type. UserError of `where`: it is of another type.
std::vector<float> from_exchange(std::span<const std::byte> data, SafetensorsType type,
                                 const std::string& where);

/// The tensors of a model: model.safetensors, or the files that model.safetensors.index.json names.
class ExchangeWeights {
 public:
  /// UserError: no such file, an index that is no JSON or names a file outside of the folder, a damaged file.
  explicit ExchangeWeights(const std::filesystem::path& folder);

  /// UserError when a tensor of these parameters is missing or of another shape, or one belongs to none of
  /// them. Passed over: rotary tables, and a head beside tied embeddings.
  void require(const std::vector<ParameterSpec>& specs, const ModelConfig& model) const;
  /// Whether they are BF16, each of them.
  bool are_bf16() const;
  /// All values of a parameter. UserError: not of a floating type.
  std::vector<float> read(const ParameterSpec& spec, const ModelConfig& model) const;

 private:
  const SafetensorsFile* file_of(const std::string& name) const;

  std::filesystem::path folder_;
  std::vector<SafetensorsFile> files_;
};

}  // namespace fathom
