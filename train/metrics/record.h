// What a run records: steps, evaluations, events. One record is one line of metrics.jsonl; docs/runs.md lists
// the keys.
//
// A number that is not finite is written as null and read back as NaN. By-layer lists have one entry for each
// *routed* layer, in the order of `routed_layers` (0-based block indices), and those of experts one for each
// of `expert_layers`; a dense model has none of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace fathom {

/// A router's logits r over the tokens of one logged step, for one routed layer.
struct RouterStats {
  double mean = 0.0;
  double min = 0.0;
  double max = 0.0;
  double above_half = 0.0;  // share of tokens with sigma(r) > 0.5
};

/// How the experts of one layer shared the tokens of one logged step.
struct ExpertStats {
  double uncovered = 0.0;      // share of tokens that no expert took: they skip the MLP
  double per_token = 0.0;      // experts a token, mean
  double dropped = 0.0;        // token choice: share of the choices that found no room
  double load_max = 0.0;       // tokens of the busiest expert, 1 being the mean over experts
  double load_min = 0.0;       // of the idlest one
  double noop_affinity = 0.0;  // mean affinity that the no-ops have of a token, together
  double noop_share = 0.0;     // share of tokens whose largest affinity is a no-op's
  double entropy = 0.0;        // of a token's affinity, nats, mean
};

struct ExpertKey {
  const char* key;  // in metrics.jsonl, a list by layer
  double ExpertStats::*member;
};
inline constexpr ExpertKey kExpertKeys[] = {
    {"expert_uncovered", &ExpertStats::uncovered}, {"expert_per_token", &ExpertStats::per_token},
    {"expert_dropped", &ExpertStats::dropped},     {"expert_load_max", &ExpertStats::load_max},
    {"expert_load_min", &ExpertStats::load_min},   {"noop_affinity", &ExpertStats::noop_affinity},
    {"noop_share", &ExpertStats::noop_share},      {"expert_entropy", &ExpertStats::entropy}};

/// A logged optimizer step. `step` counts the optimizer steps done, this one included; `tokens`, `flops` and
/// `seconds` count since the run's first start, earlier parts of a resumed run included.
struct StepRecord {
  std::int64_t step = 0;
  std::int64_t tokens = 0;
  double flops = 0.0;                        // training FLOPs so far
  double loss = 0.0;                         // language-model loss of this step, nats a token
  std::optional<double> loss_average;        // running mean of the loss
  double lr = 0.0;                           // the rate that this step used
  double grad_norm = 0.0;                    // global norm before clipping
  double tokens_per_s = 0.0;                 // since the previous record
  double flops_per_s = 0.0;                  // since the previous record
  std::optional<double> mfu;                 // flops_per_s as a share of the measured or given peak
  double seconds = 0.0;                      // of training
  std::optional<double> memory_bytes;        // peak of tensors
  std::optional<double> memory_held_bytes;   // now: tensors, blocks kept for reuse, what ops share
  std::optional<double> device_used_bytes;   // now, by all programs, where the device says it
  std::optional<double> aux_loss;            // BCE on the routers' logits, mean over tokens and layers
  std::optional<double> predictor_loss;      // BCE of the predictors
  std::optional<double> balance_loss;        // of token choice: 1 when the experts' loads are even
  std::optional<double> z_loss;              // of its routers
  std::optional<double> predictor_accuracy;  // share of tokens where the causal decision equals top-k
  std::optional<double> expert_aux_loss;  // of expert choice: aux_loss of its routers, mean over choices too
  std::optional<double> expert_predictor_loss;
  std::optional<double> expert_accuracy;  // share of (token, expert) where the causal decision equals top-k
  std::vector<std::int64_t> routed_layers;
  std::vector<double> routed_fraction;  // by routed layer: share of tokens that went through the block
  std::vector<RouterStats> router;      // by routed layer
  std::vector<std::int64_t> expert_layers;
  std::vector<ExpertStats> experts;  // by layer with experts
};

/// An evaluation on the fixed validation slice. A dense model fills val_loss; a routed one val_topk and
/// val_causal.
struct EvalRecord {
  std::int64_t step = 0;
  std::int64_t tokens = 0;           // trained on so far
  double flops = 0.0;                // training FLOPs so far
  double seconds = 0.0;              // of training so far
  std::optional<double> val_loss;    // nats a token
  std::optional<double> val_topk;    // routing as in training
  std::optional<double> val_causal;  // routing by the causal rule: the loss that can be served
  std::optional<double> bits_per_byte;
  std::vector<std::int64_t> routed_layers;
  std::vector<double> realised_capacity;  // by routed layer, under the causal rule
  std::optional<double> router_recall;    // of the causal decision against top-k, mean over routed layers
  std::optional<double> router_precision;
  std::vector<double> router_recall_by_layer;
  std::vector<double> router_precision_by_layer;
  std::vector<std::int64_t> expert_layers;
  /// By layer with experts, by expert: the share of the block's tokens that it took under the causal rule.
  std::vector<std::vector<double>> expert_capacity;
  std::optional<double> expert_recall;  // of expert choice: causal against top-k, mean over expert_layers
  std::optional<double> expert_precision;
  std::vector<double> expert_recall_by_layer;
  std::vector<double> expert_precision_by_layer;
  std::optional<double> causal_flops_per_token;  // of a forward pass, from the realised capacity

  /// The loss that a run is judged by: val_loss, else val_causal, else val_topk; NaN when there is none.
  double judged_loss() const {
    if (val_loss) return *val_loss;
    if (val_causal) return *val_causal;
    return val_topk.value_or(std::nan(""));
  }
};

enum class EventKind { Start, Resume, Spike, Nan, Checkpoint, Stop, End };

/// How a run ended. Stopped: by a signal or by train.on_spike, and can be resumed.
enum class RunStatus { Done, Stopped, Failed };

/// What does not change during a run; start and resume events carry it, flat, so that a report needs no other
/// file.
struct RunFacts {
  std::int64_t params_total = 0;
  std::int64_t params_active = 0;
  double flops_per_token_forward = 0.0;
  double flops_per_token_train = 0.0;
  std::int64_t total_steps = 0;   // the horizon
  std::int64_t batch_tokens = 0;  // tokens a step
  std::int64_t seq_len = 0;
  std::int64_t depth = 0;  // blocks
  std::vector<std::int64_t> routed_layers;
  std::optional<double> capacity;       // C of a routed model
  std::int64_t train_store_tokens = 0;  // tokens in the training store: passes over the data = tokens / this
  std::string tokenizer_hash;           // of the stores: losses a token compare between equal tokenizers only
  std::string
      valid_source_hash;  // of the validation store's text, whatever its tokenizer; empty: no such store
  std::uint64_t seed = 0;
  std::string device;  // as the user would name it, and how many threads
  std::string git_sha;
};

struct EventRecord {
  EventKind kind = EventKind::Start;
  std::int64_t step = 0;                  // steps done when it happened
  double seconds = 0.0;                   // of training
  std::string message;                    // for people; may be empty
  std::optional<RunFacts> facts;          // start, resume
  std::string checkpoint;                 // checkpoint, resume: the file's name
  std::optional<RunStatus> status;        // end
  std::optional<std::int64_t> tokens;     // end
  std::optional<double> flops;            // end
  std::optional<double> final_loss;       // end: running mean of the training loss
  std::optional<double> best_val_loss;    // end: by EvalRecord::judged_loss
  std::optional<std::int64_t> best_step;  // end: where it was
  std::string time;                       // UTC, ISO 8601; the log fills it in when empty
};

const char* name_of(EventKind kind);    // "start", "resume", "spike", "nan", "checkpoint", "stop", "end"
const char* name_of(RunStatus status);  // "done", "stopped", "failed"

/// One line of JSON, without the newline. Always valid JSON.
std::string to_json_line(const StepRecord& record);
std::string to_json_line(const EvalRecord& record);
std::string to_json_line(const EventRecord& record);

/// A line of a kind that this version does not know is a std::monostate.
using AnyRecord = std::variant<std::monostate, StepRecord, EvalRecord, EventRecord>;

/// The inverse of to_json_line. Unknown keys are ignored. UserError: not a JSON object, or a value of the
/// wrong type; the message leaves path and line number to the caller.
AnyRecord parse_record(std::string_view line);

}  // namespace fathom
