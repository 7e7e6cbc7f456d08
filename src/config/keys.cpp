#include "src/config/keys.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include <fmt/format.h>

#include "src/config/names.h"
#include "src/config/scalar.h"

namespace fathom {
namespace {

template <auto... Path>
auto& member(Config& c) {
  return (c.*....*Path);
}
template <auto... Path>
const auto& member(const Config& c) {
  return (c.*....*Path);
}

template <typename T>
constexpr bool is_optional = false;
template <typename T>
constexpr bool is_optional<std::optional<T>> = true;

// How a value of type T is written in YAML: its name in messages, read and print.
template <typename T>
struct Yaml;

template <>
struct Yaml<std::int64_t> {
  static constexpr std::string_view type = "a whole number";
  static std::optional<std::int64_t> read(const Key& key, const std::string& text) {
    const auto x = read_integer(text);
    return x && key.range.holds(static_cast<double>(*x)) ? x : std::nullopt;
  }
  static std::string print(std::int64_t x) { return std::to_string(x); }
};

template <>
struct Yaml<std::uint64_t> {
  static constexpr std::string_view type = "a whole number";
  static std::optional<std::uint64_t> read(const Key&, const std::string& text) {
    return read_unsigned(text);
  }
  static std::string print(std::uint64_t x) { return std::to_string(x); }
};

template <>
struct Yaml<double> {
  static constexpr std::string_view type = "a number";
  static std::optional<double> read(const Key& key, const std::string& text) {
    const auto x = read_number(text);
    return x && key.range.holds(*x) ? x : std::nullopt;
  }
  static std::string print(double x) { return print_number(x); }
};

template <>
struct Yaml<bool> {
  static constexpr std::string_view type = "true or false";
  static std::optional<bool> read(const Key&, const std::string& text) { return read_bool(text); }
  static std::string print(bool x) { return x ? "true" : "false"; }
};

template <>
struct Yaml<std::string> {
  static constexpr std::string_view type = "text";
  static std::string print(const std::string& x) { return print_text(x); }
};

template <>
struct Yaml<std::vector<double>> {
  static constexpr std::string_view type = "a list of two numbers";
  static std::string print(const std::vector<double>& x) {
    std::vector<std::string> items(x.size());
    std::transform(x.begin(), x.end(), items.begin(), print_number);
    return fmt::format("[{}]", fmt::join(items, ", "));
  }
};

template <NamedEnum E>
struct Yaml<E> {
  static constexpr std::string_view type = "one of";
  static std::optional<E> read(const Key&, const std::string& text) {
    const auto& names = EnumNames<E>::values;
    const auto found = std::find(names.begin(), names.end(), text);
    if (found == names.end()) return std::nullopt;
    return static_cast<E>(found - names.begin());
  }
  static std::string print(E x) { return name_of(x); }
};

template <typename T>
bool read_value(T& to, const Key& key, const Entry& entry) {
  using Form = Entry::Form;
  if constexpr (is_optional<T>) {
    if (entry.form == Form::Null) {
      to.reset();
      return true;
    }
    typename T::value_type value{};
    if (!read_value(value, key, entry)) return false;
    to = value;
    return true;
  } else if constexpr (std::is_same_v<T, std::string>) {
    if (entry.form != Form::Plain && entry.form != Form::Quoted && entry.form != Form::Null) return false;
    to = entry.text;
    return key.choices.empty() || std::find(key.choices.begin(), key.choices.end(), to) != key.choices.end();
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    if (entry.form != Form::List || entry.items.size() != 2) return false;
    std::vector<double> values;
    for (const std::string& item : entry.items) {
      const auto x = Yaml<double>::read(key, item);
      if (!x) return false;
      values.push_back(*x);
    }
    to = values;
    return true;
  } else {
    // Only names may be quoted: depth: "12" is text, and text is not a number.
    if (entry.form != Form::Plain && !(NamedEnum<T> && entry.form == Form::Quoted)) return false;
    const auto x = Yaml<T>::read(key, entry.text);
    if (x) to = *x;
    return x.has_value();
  }
}

template <auto... Path>
Key key(std::string_view path, Range range, std::string_view reason, std::string_view help,
        std::span<const char* const> choices = {}) {
  using Member = std::remove_cvref_t<decltype(member<Path...>(std::declval<Config&>()))>;
  Key k{.path = path,
        .range = range,
        .reason = reason,
        .help = help,
        .type = "",
        .choices = choices,
        .optional = is_optional<Member>,
        .read = [](Config& c, const Key& self,
                   const Entry& e) { return read_value(member<Path...>(c), self, e); },
        .print = nullptr};
  if constexpr (is_optional<Member>) {
    using Value = typename Member::value_type;
    k.type = Yaml<Value>::type;
    k.print = [](const Config& c) -> std::string {
      const Member& value = member<Path...>(c);
      return value ? Yaml<Value>::print(*value) : "null";
    };
  } else {
    k.type = choices.empty() ? Yaml<Member>::type : "one of";
    if constexpr (NamedEnum<Member>) k.choices = EnumNames<Member>::values;
    k.print = [](const Config& c) -> std::string { return Yaml<Member>::print(member<Path...>(c)); };
  }
  return k;
}

constexpr Range from_to(double min, double max) { return {.min = min, .max = max}; }
constexpr Range above_upto(double min, double max) { return {.min = min, .max = max, .above_min = true}; }
constexpr Range from_below(double min, double max) { return {.min = min, .max = max, .below_max = true}; }
constexpr Range between(double min, double max) {
  return {.min = min, .max = max, .above_min = true, .below_max = true};
}
constexpr Range kAny{};
constexpr Range kNotNegative{.min = 0};
constexpr std::array kPrecisions{"fp32", "bf16"};

std::vector<Key> make_keys() {
  constexpr auto model = &Config::model;
  constexpr auto rope = &ModelConfig::rope_scaling;
  constexpr auto routing = &Config::routing;
  constexpr auto causal = &RoutingConfig::causal;
  constexpr auto experts = &RoutingConfig::experts;
  constexpr auto data = &Config::data;
  constexpr auto train = &Config::train;
  using M = ModelConfig;
  using S = RopeScaling;
  using R = RoutingConfig;
  using C = CausalConfig;
  using E = ExpertsConfig;
  using D = DataConfig;
  using T = TrainConfig;
  return {
      key<&Config::seed>("seed", kNotNegative, "",
                         "Seed of the weights, the data order and the stochastic control."),
      key<&Config::deterministic>(
          "deterministic", kAny, "",
          "Choose reproducible kernels where a faster one is not; the CPU always does."),
      key<&Config::invariant>(
          "invariant", kAny, "",
          "Row-invariant mode: a row's result does not depend on how many rows there are."),
      key<&Config::device>("device", kAny, "", "cpu, cuda, cuda:N or auto."),

      key<model, &M::vocab_size>(
          "model.vocab_size", from_to(0, 16777216), "",
          "V, entries of the embedding; 0: the store's, rounded up to a multiple of 64."),
      key<model, &M::width>("model.width", from_to(2, 65536), "the smallest head has two elements, for RoPE",
                            "D, elements of the residual stream."),
      key<model, &M::depth>("model.depth", from_to(1, 4096), "a model has at least one block", "Blocks."),
      key<model, &M::heads>("model.heads", from_to(1, 4096), "attention needs a head",
                            "H, query heads; divides width, unless model.head_dim is given."),
      key<model, &M::kv_heads>("model.kv_heads", from_to(0, 4096), "",
                               "G, key and value heads; divides heads; 0: as many as heads."),
      key<model, &M::own_head_dim>("model.head_dim", from_to(0, 4096), "",
                                   "d, elements of a head, even; 0: width / heads."),
      key<model, &M::ffn_hidden>(
          "model.ffn_hidden", from_to(0, 1048576), "",
          "F, hidden width of the MLP; 0: 8/3 of width, rounded up to a multiple of 64."),
      key<model, &M::max_seq_len>("model.max_seq_len", from_to(0, 16777216), "",
                                  "Longest sequence that the model is meant for, tokens; 0: train.seq_len."),
      key<model, &M::rope_theta>("model.rope_theta", from_to(1, 1e12), "the base of the rotary wavelengths",
                                 "Base of the rotary position embedding."),
      key<model, &M::norm_eps>("model.norm_eps", above_upto(0, 0.1), "it keeps the norm of a zero row finite",
                               "Epsilon of RMSNorm."),
      key<model, &M::qk_norm>("model.qk_norm", kAny, "", "RMSNorm on each head's queries and keys."),
      key<model, &M::tie_embeddings>("model.tie_embeddings", kAny, "",
                                     "The output head is the embedding, transposed."),
      key<model, rope, &S::kind>(
          "model.rope_scaling.kind", kAny, "",
          "Longer rotary wavelengths, for a longer context than the model was trained in at first: "
          "linear: all of them; llama3: the long ones."),
      key<model, rope, &S::factor>("model.rope_scaling.factor", from_to(1, 1e6), "wavelengths become longer",
                                   "So many times as long (linear, llama3)."),
      key<model, rope, &S::low_freq_factor>(
          "model.rope_scaling.low_freq_factor", above_upto(0, 1e6), "it divides a length",
          "llama3: a wavelength of original_max_seq_len / this, or more, is one of the long ones."),
      key<model, rope, &S::high_freq_factor>(
          "model.rope_scaling.high_freq_factor", above_upto(0, 1e6), "it divides a length",
          "llama3: a wavelength of original_max_seq_len / this, or less, stays as it is."),
      key<model, rope, &S::original_max_seq_len>(
          "model.rope_scaling.original_max_seq_len", from_to(1, 16777216), "a sequence has a token",
          "llama3: the longest sequence of the training before, tokens."),

      key<routing, &R::kind>("routing.kind", kAny, "",
                             "none: a dense model; mod: Mixture-of-Depths; moe: experts in every block's "
                             "MLP; mode_staged: mod, with "
                             "experts in every MLP; mode_integrated: experts, of which some do nothing."),
      key<routing, &R::every>("routing.every", from_to(1, 4096), "1 routes every block from `first` on",
                              "Block i is routed when i >= first and (i - first) is a multiple of every."),
      key<routing, &R::first>("routing.first", from_to(0, 4095), "blocks are counted from 0",
                              "Index of the first routed block."),
      key<routing, &R::capacity>(
          "routing.capacity", above_upto(0, 1), "it is the share of the tokens that are kept",
          "C: a routed block computes K = max(1, floor(C T)) tokens of each sequence."),
      key<routing, &R::selection>(
          "routing.selection", kAny, "",
          "topk: the router's K largest; stochastic: Gaussian noise's, the paper's control."),
      key<routing, &R::gate>("routing.gate", kAny, "",
                             "g of the router's scalar that multiplies the block's output."),
      key<routing, causal, &C::method>(
          "routing.causal.method", kAny, "",
          "How a token is chosen without the future, by routed blocks and by experts that choose: aux: the "
          "router, trained with an auxiliary loss; predictor: an MLP of its own; both; none: training and "
          "top-k evaluation only, such a model cannot be served; auto: predictor where experts choose, else "
          "aux."),
      key<routing, causal, &C::aux_weight>("routing.causal.aux_weight", from_to(0, 1000),
                                           "a weight is not negative",
                                           "Weight of the auxiliary loss (aux, both)."),
      key<routing, causal, &C::predictor_hidden>(
          "routing.causal.predictor_hidden", from_to(0, 65536), "",
          "Hidden width of the predictor; 0: a quarter of model.width."),
      key<routing, causal, &C::threshold>(
          "routing.causal.threshold", between(0, 1), "it is compared with a sigmoid",
          "A token goes through the block, or to the expert, when its probability is above this."),

      key<routing, experts, &E::count>("experts.count", from_to(1, 1024), "a MLP of experts has one",
                                       "E, experts of each MLP (moe, mode_staged, mode_integrated)."),
      key<routing, experts, &E::choice>("experts.choice", kAny, "",
                                        "expert: each expert takes the tokens with the largest affinity for "
                                        "it; token: each token goes to the experts "
                                        "with the largest affinity for it."),
      key<routing, experts, &E::capacity_factor>(
          "experts.capacity_factor", from_to(0, 1024), "",
          "Room of an expert: max(1, floor(capacity_factor k T / E)) tokens of each sequence, k being top_k "
          "or, with "
          "choice: expert, 1. 0 (token): no limit; each expert then has room, and computes, for all T."),
      key<routing, experts, &E::top_k>("experts.top_k", from_to(1, 1024), "a token goes somewhere",
                                       "token: experts that a token chooses."),
      key<routing, experts, &E::noop>(
          "experts.noop", from_to(0, 1024), "",
          "Choices besides the experts that compute nothing and draw affinity from them (mode_integrated)."),
      key<routing, experts, &E::balance_weight>("experts.balance_weight", from_to(0, 1000),
                                                "a weight is not negative",
                                                "token: weight of the load-balancing loss."),
      key<routing, experts, &E::z_weight>("experts.z_weight", from_to(0, 1000), "a weight is not negative",
                                          "token: weight of the router's z-loss."),

      key<data, &D::train>("data.train", kAny, "", "Token store to train on."),
      key<data, &D::valid>("data.valid", kAny, "", "Token store to evaluate on; empty: no evaluation."),
      key<data, &D::tokenizer>("data.tokenizer", kAny, "", "Tokenizer; a byte store needs none."),
      key<data, &D::document_mask>("data.document_mask", kAny, "",
                                   "Attention stays within a document of a sequence."),

      key<train, &T::seq_len>("train.seq_len", from_to(1, 16777216), "a sequence has a token",
                              "T, tokens a sequence."),
      key<train, &T::batch_tokens>("train.batch_tokens", from_to(1, 1e10), "a step trains on a token",
                                   "Tokens an optimizer step; a multiple of seq_len."),
      key<train, &T::micro_batch>(
          "train.micro_batch", from_to(0, 1e10), "",
          "Sequences a forward pass; divides batch_tokens / seq_len; 0: all of them."),
      key<train, &T::lr>("train.lr", above_upto(0, 100), "0 would train nothing",
                         "Peak learning rate of AdamW."),
      key<train, &T::schedule>("train.schedule", kAny, "",
                               "cosine over all steps; wsd: constant, then a linear decay; constant."),
      key<train, &T::warmup>("train.warmup", from_to(0, 1e9), "",
                             "Linear warm-up: below 1 a share of the steps, else steps."),
      key<train, &T::min_lr_ratio>("train.min_lr_ratio", from_to(0, 1), "it is a share of lr",
                                   "Learning rate at the end of cosine and wsd, as a share of lr."),
      key<train, &T::wsd_decay>("train.wsd_decay", above_upto(0, 1), "it is a share of the steps",
                                "wsd: the share of the steps that decays."),
      key<train, &T::weight_decay>("train.weight_decay", from_to(0, 100), "a decay is not negative",
                                   "AdamW's decoupled weight decay, of matrices only."),
      key<train, &T::betas>("train.betas", from_below(0, 1), "they are averages' weights of the past",
                            "AdamW's decay rates of the first and second moment."),
      key<train, &T::eps>("train.eps", above_upto(0, 1),
                          "it keeps a step finite where a gradient is always zero", "AdamW's epsilon."),
      key<train, &T::grad_clip>("train.grad_clip", from_to(0, 1e9), "",
                                "Largest global norm of the gradient; 0: off."),
      key<train, &T::target_flops>("train.target_flops", above_upto(0, 1e30), "training costs something",
                                   "Horizon: training FLOPs (docs/flops.md); give exactly one horizon."),
      key<train, &T::tokens>("train.tokens", from_to(1, 1e15), "training sees a token",
                             "Horizon: training tokens; give exactly one horizon."),
      key<train, &T::steps>("train.steps", from_to(1, 1e12), "training takes a step",
                            "Horizon: optimizer steps; give exactly one horizon."),
      key<train, &T::precision>("train.precision", kAny, "",
                                "Arithmetic of the forward and backward pass; bf16 needs CUDA.", kPrecisions),
      key<train, &T::reduction>("train.reduction", kAny, "",
                                "Of several ranks: what gradients are sent and added up as; bf16 is half as "
                                "much to send between GPUs (on the CPU it is widened first: no less).",
                                kPrecisions),
      key<train, &T::recompute>(
          "train.recompute", kAny, "",
          "block: keep a block's input only and compute it again in the backward pass."),
      key<train, &T::log_every>("train.log_every", from_to(1, 1e9), "",
                                "Steps between lines of metrics.jsonl."),
      key<train, &T::eval_every>("train.eval_every", from_to(0, 1e12), "",
                                 "Steps between evaluations; 0: at the end only."),
      key<train, &T::eval_tokens>("train.eval_tokens", from_to(1, 1e12), "",
                                  "Tokens of the fixed validation slice."),
      key<train, &T::checkpoint_every>("train.checkpoint_every", from_to(0, 1e12), "",
                                       "Steps between checkpoints; 0: at the end only."),
      key<train, &T::keep_checkpoints>("train.keep_checkpoints", from_to(1, 1e6),
                                       "a run keeps its latest checkpoint",
                                       "How many of the latest checkpoints stay."),
      key<train, &T::on_spike>("train.on_spike", kAny, "",
                               "What a loss spike or NaN does: stop, skip the step, or warn."),
      key<train, &T::spike_factor>("train.spike_factor", above_upto(1, 1e9),
                                   "at 1 every rise would be a spike",
                                   "A spike is a loss above this times its running mean."),
      key<train, &T::rank_timeout>("train.rank_timeout", from_to(1, 1e6), "a busy machine answers late",
                                   "Of several ranks: seconds without a word after which one is given up."),
  };
}

}  // namespace

std::span<const Key> config_keys() {
  static const std::vector<Key> keys = make_keys();
  return keys;
}

const Key* find_key(std::string_view path) {
  for (const Key& k : config_keys()) {
    if (k.path == path) return &k;
  }
  return nullptr;
}

bool is_section(std::string_view path) {
  return std::ranges::any_of(config_keys(), [&](const Key& k) {
    return k.path.size() > path.size() && k.path.starts_with(path) && k.path[path.size()] == '.';
  });
}

std::string expectation(const Key& key) {
  if (!key.choices.empty()) return fmt::format("one of {}", fmt::join(key.choices, ", "));
  std::string words(key.type);
  const Range& r = key.range;
  const bool low = r.min > -std::numeric_limits<double>::infinity();
  const bool high = r.max < std::numeric_limits<double>::infinity();
  if (low && high && !r.above_min && !r.below_max) {
    words += fmt::format(" from {} to {}", print_number(r.min), print_number(r.max));
  } else {
    if (low) words += fmt::format(" {} {}", r.above_min ? "above" : "of at least", print_number(r.min));
    if (low && high) words += " and";
    if (high) words += fmt::format(" {} {}", r.below_max ? "below" : "at most", print_number(r.max));
  }
  return words;
}

}  // namespace fathom
