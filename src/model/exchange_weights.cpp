#include "src/model/exchange_weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/core/shape.h"
#include "src/io/atomic_file.h"

namespace fathom {

namespace {

namespace fs = std::filesystem;

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

float from_half(std::uint16_t half) {
  const bool negative = (half >> 15) != 0;
  const int exponent = (half >> 10) & 31;
  const auto mantissa = static_cast<float>(half & 1023);
  float value = 0;
  if (exponent == 31) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, -24);
  } else {
    value = std::ldexp(mantissa + 1024, exponent - 25);
  }
  return negative ? -value : value;
}

float from_bfloat(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

std::uint16_t to_bfloat(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 64U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// Elements of type E, which may lie at any address, each made a float.
template <typename E, typename Convert>
std::vector<float> convert(std::span<const std::byte> data, Convert&& one) {
  std::vector<float> values(data.size() / sizeof(E));
  for (std::size_t i = 0; i < values.size(); ++i) {
    E element;
    std::memcpy(&element, data.data() + i * sizeof(E), sizeof(E));
    values[i] = one(element);
  }
  return values;
}

std::string replaced(const std::string& name, std::string_view part, std::string_view by) {
  std::string result = name;
  return result.replace(name.find(part), part.size(), by);
}

bool is_passed_over(const std::string& name, const ModelConfig& model) {
  return name.ends_with(".rotary_emb.inv_freq") || (model.tie_embeddings && name == "lm_head.weight");
}

// The files that an index names: each within the folder itself.
std::set<std::string> files_of_index(const fs::path& path) {
  const nlohmann::json json =
      nlohmann::json::parse(read_file(path.string(), "index of weights"), nullptr, false);
  const bool is_index = json.is_object() && json.contains("weight_map") && json["weight_map"].is_object();
  if (!is_index) throw UserError(fmt::format("{} is no JSON object with a weight_map.", path.string()));
  std::set<std::string> names;
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || fs::path(name).filename() != name) {
      throw UserError(
          fmt::format("{} has a tensor in {}, which is no file of its folder.", path.string(), file.dump()));
    }
    names.insert(name);
  }
  return names;
}

}  // namespace

std::vector<ExchangePart> exchange_parts(const ParameterSpec& spec, const ModelConfig& model) {
  const std::vector<std::int64_t> dims = spec.shape.dims();
  constexpr std::string_view kQkv = "self_attn.qkv_proj", kGateUp = ".mlp.gate_up_proj";
  if (spec.name.find(kQkv) != spec.name.npos) {
    const auto part = [&](std::string_view by, std::int64_t heads) {
      return ExchangePart{replaced(spec.name, kQkv, by), {heads * model.head_dim(), dims[1]}};
    };
    return {part("self_attn.q_proj", model.heads), part("self_attn.k_proj", model.kv_heads),
            part("self_attn.v_proj", model.kv_heads)};
  }
  if (spec.name.find(kGateUp) != spec.name.npos) {
    const std::vector<std::int64_t> half = {dims[0] / 2, dims[1]};
    return {{replaced(spec.name, kGateUp, ".mlp.gate_proj"), half},
            {replaced(spec.name, kGateUp, ".mlp.up_proj"), half}};
  }
  constexpr std::string_view kExperts = ".mlp.experts.";
  if (const std::size_t at = spec.name.find(kExperts); at != spec.name.npos) {
    // Expert by expert, gate before up: as they lie in memory.
    const std::string before = spec.name.substr(0, at + kExperts.size());
    const bool is_pair = spec.name.find("gate_up_proj") != spec.name.npos;
    const std::vector<std::int64_t> shape = {is_pair ? dims[1] / 2 : dims[1], dims[2]};
    std::vector<ExchangePart> parts;
    for (std::int64_t e = 0; e < dims[0]; ++e) {
      for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
        if (is_pair == (std::string_view(name) == "down_proj")) continue;
        parts.push_back({fmt::format("{}{}.{}.weight", before, e, name), shape});
      }
    }
    return parts;
  }
  return {{spec.name, dims}};
}

PackedPart packed_part(const ExchangePart& part, const PackedFormat& format) {
  const std::int64_t rows = part.shape[0];
  const auto type = format.bits == 8 ? SafetensorsType::I8 : SafetensorsType::U8;
  return {{part.name + "_packed", type, {rows, format.code_bytes()}},
          {part.name + "_scale", SafetensorsType::F32, {rows, format.groups()}}};
}

SafetensorsEntry key_means_entry(std::int64_t layer, const ModelConfig& model) {
  return {fmt::format("model.layers.{}.self_attn.key_mean", layer),
          SafetensorsType::F32,
          {model.kv_heads, model.head_dim()}};
}

std::vector<std::byte> to_exchange(std::span<const float> values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  if (dtype == DType::F32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t rounded = to_bfloat(values[i]);
    std::memcpy(bytes.data() + i * sizeof rounded, &rounded, sizeof rounded);
  }
  return bytes;
}

std::vector<float> from_exchange(std::span<const std::byte> data, SafetensorsType type,
                                 const std::string& where) {
  switch (type) {
    case SafetensorsType::F32:
      return convert<float>(data, [](float x) { return x; });
    case SafetensorsType::F64:
      return convert<double>(data, [](double x) { return static_cast<float>(x); });
    case SafetensorsType::BF16:
      return convert<std::uint16_t>(data, from_bfloat);
    case SafetensorsType::F16:
      return convert<std::uint16_t>(data, from_half);
    default:
      throw UserError(fmt::format("{} is of type {}, and weights are to be F32, F64, F16 or BF16.", where,
                                  name_of(type)));
  }
}

ExchangeWeights::ExchangeWeights(const fs::path& folder) : folder_(folder) {
  std::error_code error;
  const fs::path single = folder / kWeights, index = folder / kIndex;
  if (fs::exists(single, error) || !fs::exists(index, error)) {
    files_.emplace_back(single.string());
    return;
  }
  for (const std::string& name : files_of_index(index)) files_.emplace_back((folder / name).string());
}

const SafetensorsFile* ExchangeWeights::file_of(const std::string& name) const {
  for (const SafetensorsFile& file : files_) {
    if (file.find(name) != nullptr) return &file;
  }
  return nullptr;
}

const SafetensorsFile& ExchangeWeights::require(const std::string& name,
                                                const std::vector<std::int64_t>& shape,
                                                const SafetensorsType* type) const {
  const SafetensorsFile* file = file_of(name);
  if (file == nullptr) {
    throw UserError(
        fmt::format("{} has no tensor {}, which its config.json calls for.", folder_.string(), name));
  }
  const SafetensorsEntry& entry = *file->find(name);
  if (entry.shape != shape) {
    throw UserError(fmt::format("{}: {} is {}, and config.json calls for {}.", file->path(), name,
                                Shape(entry.shape).str(), Shape(shape).str()));
  }
  if (type != nullptr && entry.type != *type) {
    throw UserError(fmt::format("{}: {} is of type {}, and is to be {}.", file->path(), name,
                                name_of(entry.type), name_of(*type)));
  }
  return *file;
}

void ExchangeWeights::require(const std::vector<ParameterSpec>& specs, const ModelConfig& model,
                              const Quantization* quantization) const {
  const auto format_of = [&](const ParameterSpec& spec) {
    try {
      return quantization->format(spec);
    } catch (const UserError& e) {
      throw UserError(fmt::format("{}: {}", (folder_ / "config.json").string(), e.what()));
    }
  };
  std::set<std::string> expected;
  for (const ParameterSpec& spec : specs) {
    const bool is_packed = quantization != nullptr && quantization->holds(spec);
    for (const ExchangePart& part : exchange_parts(spec, model)) {
      if (!is_packed) {
        expected.insert(part.name);
        require(part.name, part.shape, nullptr);
        continue;
      }
      const PackedPart packed = packed_part(part, format_of(spec));
      for (const SafetensorsEntry& entry : {packed.codes, packed.scales}) {
        expected.insert(entry.name);
        require(entry.name, entry.shape, &entry.type);
      }
    }
  }
  for (std::int64_t layer = 0; quantization != nullptr && quantization->key_means && layer < model.depth;
       ++layer) {
    const SafetensorsEntry entry = key_means_entry(layer, model);
    expected.insert(entry.name);
    require(entry.name, entry.shape, &entry.type);
  }
  for (const SafetensorsFile& file : files_) {
    for (const SafetensorsEntry& entry : file.entries()) {
      if (expected.contains(entry.name) || is_passed_over(entry.name, model)) continue;
      throw UserError(
          fmt::format("{} has a tensor {}, for which this model has no use: it is a model of another kind.",
                      file.path(), entry.name));
    }
  }
}

bool ExchangeWeights::are_bf16() const {
  return std::all_of(files_.begin(), files_.end(), [](const SafetensorsFile& file) {
    return std::all_of(file.entries().begin(), file.entries().end(),
                       [](const SafetensorsEntry& entry) { return entry.type == SafetensorsType::BF16; });
  });
}

std::vector<float> ExchangeWeights::read(const ParameterSpec& spec, const ModelConfig& model) const {
  std::vector<float> values;
  values.reserve(static_cast<std::size_t>(spec.shape.size()));
  for (const ExchangePart& part : exchange_parts(spec, model)) {
    const SafetensorsFile& file = *file_of(part.name);
    const std::vector<float> some = from_exchange(file.data(part.name), file.find(part.name)->type,
                                                  fmt::format("{}: {}", file.path(), part.name));
    values.insert(values.end(), some.begin(), some.end());
  }
  return values;
}

PackedTensor ExchangeWeights::read_packed(Context& c, const ParameterSpec& spec, const ModelConfig& model,
                                          const PackedFormat& format) const {
  std::vector<std::byte> codes;
  std::vector<float> scales;
  const auto largest = static_cast<float>(1 << (format.bits - 1));
  for (const ExchangePart& part : exchange_parts(spec, model)) {
    const PackedPart packed = packed_part(part, format);
    const std::span<const std::byte> rows = file_of(packed.codes.name)->data(packed.codes.name);
    codes.insert(codes.end(), rows.begin(), rows.end());
    const SafetensorsFile& file = *file_of(packed.scales.name);
    const std::string where = fmt::format("{}: {}", file.path(), packed.scales.name);
    for (const float scale : from_exchange(file.data(packed.scales.name), SafetensorsType::F32, where)) {
      if (!std::isfinite(scale * largest))
        throw UserError(
            fmt::format("{} holds a scale of {}, with which weights are not finite.", where, scale));
      scales.push_back(scale);
    }
  }
  return upload_packed(c, spec.shape, format, codes, scales);
}

std::vector<float> ExchangeWeights::read_key_means(std::int64_t layer, const ModelConfig& model) const {
  const std::string name = key_means_entry(layer, model).name;
  const SafetensorsFile& file = *file_of(name);
  const std::string where = fmt::format("{}: {}", file.path(), name);
  std::vector<float> means = from_exchange(file.data(name), SafetensorsType::F32, where);
  for (const float mean : means) {
    if (!std::isfinite(mean))
      throw UserError(fmt::format("{} holds a mean of {}, without which no key is finite.", where, mean),
                      "Quantize the model again.");
  }
  return means;
}

}  // namespace fathom
