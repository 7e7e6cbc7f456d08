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
#include "src/model/quantization.h"
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

/// What such a part is with weights of few bits: NAME_packed, the rows' codes, and NAME_scale.
struct PackedPart {
  SafetensorsEntry codes;   // 4 bits: U8 [rows, code_bytes()]; 8 bits: I8 [rows, columns]
  SafetensorsEntry scales;  // F32 [rows, groups()]
};
PackedPart packed_part(const ExchangePart& part, const PackedFormat& format);

/// A layer's key means (Transformer::key_means), F32 [kv_heads, head_dim].
SafetensorsEntry key_means_entry(std::int64_t layer, const ModelConfig& model);

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
  /// them; of weights of few bits, and of means of keys, also when it is of another type, or when groups do
  /// not divide rows. Passed over: rotary tables, and a head beside tied embeddings. `quantization` may be
  /// null.
  void require(const std::vector<ParameterSpec>& specs, const ModelConfig& model,
               const Quantization* quantization) const;
  /// Whether they are BF16, each of them.
  bool are_bf16() const;
  /// All values of a parameter. UserError: not of a floating type.
  std::vector<float> read(const ParameterSpec& spec, const ModelConfig& model) const;
  /// A parameter of few bits, to the device. UserError: a scale that is not finite, or too large for its
  /// codes.
  PackedTensor read_packed(Context& c, const ParameterSpec& spec, const ModelConfig& model,
                           const PackedFormat& format) const;
  /// [kv_heads, head_dim] of a layer. UserError: a number that is not finite.
  std::vector<float> read_key_means(std::int64_t layer, const ModelConfig& model) const;

 private:
  const SafetensorsFile* file_of(const std::string& name) const;
  /// The file that holds a tensor, of this shape and, when `type` is not null, of this type; UserError else.
  const SafetensorsFile& require(const std::string& name, const std::vector<std::int64_t>& shape,
                                 const SafetensorsType* type) const;

  std::filesystem::path folder_;
  std::vector<SafetensorsFile> files_;
};

}  // namespace fathom
