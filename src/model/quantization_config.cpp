#include "src/model/quantization_config.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"

namespace fathom {

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kOurs = "fathom";
/// 1: weights of few bits alone. 2: rows of few bits, caches of few bits, and transforms while the model runs
/// as well, which a reader of 1 would pass over. 3: and tensors of keys' means, for which a reader of 2 would
/// take the folder for a model of another kind.
constexpr int kVersion = 1, kVersionOfRows = 2, kNewestVersion = 3;

/// What is transformed while the model runs, by the product that reads it.
struct Online {
  const char* name;
  bool OnlineHadamards::*is_on;
};
constexpr Online kOnline[] = {{"down_proj", &OnlineHadamards::down},
                              {"o_proj", &OnlineHadamards::heads},
                              {"query_key", &OnlineHadamards::queries_keys}};

/// A kind of product, and the tensors that it is in exchange.
struct Kind {
  const char* name;
  std::vector<std::string> tensors;
};
const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {{"qkv_proj", {"q_proj", "k_proj", "v_proj"}},
                                        {"o_proj", {"o_proj"}},
                                        {"gate_up_proj", {"gate_proj", "up_proj"}},
                                        {"down_proj", {"down_proj"}}};
  return all;
}

class Reader {
 public:
  Reader(const Json& json, const std::string& path) : json_(json), path_(path) {}

  Quantization read() const {
    if (!json_.is_object()) refuse("is no JSON object");
    const Json method = value("quant_method");
    if (method != kOurs) {
      throw UserError(
          fmt::format("{}: its quant_method is {}, and Fathom reads weights of few bits that it wrote "
                      "itself.",
                      path_, method.dump()),
          "Take the model before it was quantized, and fathom quantize it.");
    }
    const Json version = value("version");
    if (version != kVersion && version != kVersionOfRows && version != kNewestVersion) {
      throw UserError(
          fmt::format(
              "{}: its quantization_config is of version {}, and this Fathom reads versions {} to {}.", path_,
              version.dump(), kVersion, kNewestVersion),
          "Quantize the model again with the Fathom that reads it.");
    }
    Quantization q;
    const Json name = value("method"), bits = value("bits"), group = value("group_size");
    if (!name.is_string()) refuse(fmt::format("has the method {}, not a name", name.dump()));
    q.method = name.get<std::string>();
    const bool has_rows = version != kVersion;
    if (bits != 4 && bits != 8 && !(has_rows && bits == 16))
      refuse(fmt::format("has weights of {} bits, and Fathom knows 4 and 8", bits.dump()));
    q.bits = bits.get<int>();
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    if (!group.is_number_integer() || group < 0 || group > kMost)
      refuse(fmt::format("has a group_size of {}, not 0 or a number of columns", group.dump()));
    q.group = group.get<std::int64_t>();
    if (const auto seed = json_.find("rotation_seed"); seed != json_.end() && !seed->is_null()) {
      if (!seed->is_number_unsigned()) refuse(fmt::format("has a rotation_seed of {}", seed->dump()));
      q.rotation_seed = seed->get<std::uint64_t>();
    }
    q.kinds = kinds_of(value("tensors"));
    if (q.kinds.empty() == q.has_packed_weights())
      refuse(q.has_packed_weights() ? "names no tensors" : "names tensors of 16 bits");
    if (has_rows) {
      read_activations(q);
      q.online = online_of(value("online_hadamards"));
      const Json kv = value("kv_bits");
      if (kv != 4 && kv != 8 && kv != 16)
        refuse(fmt::format("has keys and values of {} bits, and Fathom knows 4, 8 and 16", kv.dump()));
      q.kv = kv.get<int>();
    }
    if (version == kNewestVersion) {
      const Json means = value("key_means");
      if (!means.is_boolean()) refuse(fmt::format("has key_means of {}, not true or false", means.dump()));
      q.key_means = means.get<bool>();
      if (q.key_means && q.kv == 16) refuse("has key_means beside keys of 16 bits");
    }
    return q;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw UserError(fmt::format("{}: its quantization_config {}.", path_, what), "Quantize the model again.");
  }
  Json value(const char* key) const {
    const auto found = json_.find(key);
    return found == json_.end() ? Json(nullptr) : *found;
  }
  std::set<std::string> kinds_of(const Json& tensors) const {
    if (!tensors.is_array()) refuse("has no list of tensors");
    std::set<std::string> named;
    for (const Json& t : tensors) {
      if (!t.is_string()) refuse(fmt::format("names {} among its tensors", t.dump()));
      named.insert(t.get<std::string>());
    }
    std::set<std::string> result;
    for (const Kind& kind : kinds()) {
      std::size_t found = 0;
      for (const std::string& t : kind.tensors) found += named.erase(t);
      if (found == 0) continue;
      if (found < kind.tensors.size())
        refuse(fmt::format("names some of {}, which are one matrix", fmt::join(kind.tensors, ", ")));
      result.insert(kind.name);
    }
    if (!named.empty()) refuse(fmt::format("names {}, which has no weights of few bits", *named.begin()));
    return result;
  }
  void read_activations(Quantization& q) const {
    const Json bits = value("activation_bits"), clip = value("activation_clip");
    if (bits != 4 && bits != 8 && bits != 16)
      refuse(fmt::format("has activations of {} bits, and Fathom knows 4, 8 and 16", bits.dump()));
    if (!clip.is_number() || !(clip > 0 && clip <= 1))
      refuse(fmt::format("has an activation_clip of {}, not a share above 0 and up to 1", clip.dump()));
    q.activations = bits.get<int>();
    q.activation_clip = clip.get<double>();
    if (q.activations < 16 && q.bits == 16)
      refuse(fmt::format("has activations of {} bits beside weights of 16", q.activations));
  }
  OnlineHadamards online_of(const Json& names) const {
    if (!names.is_array()) refuse("has no list of online_hadamards");
    OnlineHadamards online;
    for (const Json& name : names) {
      const auto* of = std::find_if(std::begin(kOnline), std::end(kOnline),
                                    [&](const Online& known) { return name == known.name; });
      if (of == std::end(kOnline)) refuse(fmt::format("names {} among its online_hadamards", name.dump()));
      online.*of->is_on = true;
    }
    return online;
  }

  const Json& json_;
  const std::string& path_;
};

}  // namespace

std::string print_quantization(const Quantization& q) {
  Json tensors = Json::array();
  for (const Kind& kind : kinds()) {
    if (!q.has_packed_weights() || !q.kinds.contains(kind.name)) continue;
    for (const std::string& t : kind.tensors) tensors.push_back(t);
  }
  const bool has_rows = q.bits == 16 || q.activations < 16 || q.kv < 16 || q.online.any();
  Json json = {{"quant_method", kOurs},
               {"version", q.key_means ? kNewestVersion : has_rows ? kVersionOfRows : kVersion},
               {"method", q.method},
               {"bits", q.bits},
               {"group_size", q.group},
               {"rotation_seed", q.rotation_seed ? Json(*q.rotation_seed) : Json(nullptr)},
               {"tensors", tensors}};
  if (!has_rows) return json.dump();
  json["activation_bits"] = q.activations;
  json["activation_clip"] = q.activation_clip;
  json["online_hadamards"] = Json::array();
  for (const Online& known : kOnline) {
    if (q.online.*known.is_on) json["online_hadamards"].push_back(known.name);
  }
  json["kv_bits"] = q.kv;
  if (q.key_means) json["key_means"] = true;
  return json.dump();
}

Quantization parse_quantization(const std::string& json, const std::string& path) {
  return Reader(Json::parse(json, nullptr, false), path).read();
}

}  // namespace fathom
