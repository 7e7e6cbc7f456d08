// The inference engine: many requests at once on one model. Rows of running sequences join and leave a pass
// at any step (continuous batching), prompts go in chunk by chunk between them, and keys and values live in
// blocks (kv_cache.h).
//
// A request's tokens depend on nothing beside it: routing decides token by token, sampling draws from
// (seed, position), and a sequence that had to give its blocks away is computed again to the same state. In
// the row-invariant mode that holds to the bit; in the fast mode to the rounding of products whose kernels go
// by the number of rows.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "infer/cycles.h"
#include "infer/kv_cache.h"
#include "infer/pass_counts.h"
#include "infer/prefix_cache.h"
#include "infer/sampling.h"
#include "infer/speculate/cached_model.h"
#include "infer/whole_step.h"
#include "src/model/transformer.h"

namespace fathom {

/// Texts up to which a step of one launch was faster than ops over all of them (docs/results/inference.md).
inline constexpr std::int64_t kMostWholeRows = 12;

struct EngineOptions {
  KvCacheOptions cache;
  std::int64_t max_sequences = 256;  // that run at the same time
  std::int64_t max_rows = 512;       // of a pass: every running text's next token, and chunks of prompts
  Causal rule;                       // for routed models
  std::int64_t vocab = 0;            // only ids below this are chosen: the tokenizer's; 0: all of the model's
  /// Texts that decode in steps of one launch, where the backend can (whole_step.h). A step has a few of them
  /// at a time, and reads all weights for these; where more texts decode, ops over all of them are faster.
  /// -1: as many as that is true of, and as one step has room for; 0: none; else so many, in several steps.
  std::int64_t whole_rows = -1;
  /// A step of one launch is in line before the one before it has been looked at, where the device chooses
  /// all of its tokens.
  bool launches_ahead = true;
  /// Texts that begin as others did go on from what these left in the cache, in whole blocks: what stays of
  /// texts that are done gives way to those that run. The cache's block is then the least that is shared.
  bool prefix_cache = false;
  /// Tokens are chosen as those of cycles under shared noise are (speculate/chance.h), so that a text does
  /// not depend on when it goes by which. The device does not choose then.
  bool shared_noise = false;
};

struct Request {
  std::vector<std::int32_t> prompt = {};
  std::int64_t max_tokens =
      64;  // 0: the prompt's last token is scored only, and may stand behind the context
  std::vector<std::int32_t> stop_tokens = {};  // end the text, and are not part of it
  SamplingOptions sampling = {};
  bool logprobs = false;          // of each new token
  std::int64_t top_logprobs = 0;  // with each new token, so many of the most likely ones
  bool prompt_logprobs = false;   // of each token of the prompt but the first
  /// Of its routing, in (0, 1); none: EngineOptions::rule's. A model without routed layers does not ask.
  std::optional<double> threshold = {};
  /// With EngineOptions::prefix_cache. False: it neither reads what others left nor leaves anything.
  bool prefix_cache = true;
  bool routing = false;  // of each token, which routed layers computed it
  /// The same seed is to give the same text, whoever else is served: cycles that cannot promise it are not
  /// for this text.
  bool repeatable = false;
};

enum class Finish : std::uint8_t {
  None,
  Stop,    // a stop token, or stop()
  Length,  // max_tokens, or the model's context is full
  Error    // Event::error says what
};
const char* name_of(Finish finish);  // "", "stop", "length", "error"

/// What a step did for one request: of a cycle (cycles.h) there is an event for each token.
struct Event {
  RequestId request = 0;
  bool has_token = false;
  SampledToken token;
  std::vector<SampledToken> alternatives;                      // with top_logprobs: the most likely tokens
  std::vector<double> prompt_logprobs;                         // further ones, in the prompt's order
  std::vector<std::vector<SampledToken>> prompt_alternatives;  // with top_logprobs: beside each of them
  Finish finish = Finish::None;                                // then the request is gone
  bool has_stop_token = false;  // `token` is the stop token that ended the text, and no part of it
  std::string error;
  /// With Request::routing: of further tokens, from the text's first one on (of the prompt too), by routed
  /// layer 1 where it computed the token. What was chosen last has been computed by none.
  std::vector<std::vector<std::uint8_t>> kept;
  bool is_of_cycle = false;
  // At the end of a text that was computed, and with a cycle's tokens, at each of which it may be ended:
  std::vector<double> routed_fraction;  // by routed layer: the share of it that the layer computed
  std::int64_t cached_tokens = 0;       // of the prompt, those that were in the cache when it began
  std::int64_t verifications = 0;       // cycles, and
  std::int64_t verified_tokens = 0;     // tokens that came of them
};

/// Rows, and what routed layers kept of them, with those of cycles: of these what was proposed in vain counts
/// too.
struct EngineStats : PassCounts {
  std::int64_t waiting = 0, running = 0;
  std::int64_t blocks = 0, free_blocks = 0;  // those free that no text needs which runs,
  std::int64_t prefix_blocks = 0;            // and of them those with beginnings for later texts
  std::int64_t block_bytes = 0;
  // Since the engine began:
  std::int64_t steps = 0;
  std::int64_t whole_steps = 0;        // and launches of whole steps
  std::int64_t prompt_tokens = 0;      // computed, again after a preemption too
  std::int64_t prefix_hit_tokens = 0;  // found in the cache, after a preemption too
  std::int64_t decoded_tokens = 0;     // chosen
  std::int64_t preemptions = 0;        // of texts that had been computed in part
  std::int64_t most_bytes = 0;         // of blocks in use
  CycleStats cycles;
};

/// UserError: the prompt is empty, holds ids outside of the vocabulary, is longer than the context or than
/// the cache ever holds, or an option is out of range.
void check_request(const Request& request, std::int64_t vocab, std::int64_t context, const KvCache& cache);

/// Sees the logits of every row that is chosen from, before it is: [V] of the engine's ids. For tests.
using LogitsObserver = std::function<void(RequestId, std::int64_t position, std::span<const float> logits)>;

class Engine {
 public:
  /// `c` and `model` outlive it. UserError: the cache (KvCache).
  Engine(Context& c, const Transformer& model, const EngineOptions& options);

  /// For what cycles work on: the model with the engine's cache, rule and steps. It ends with the engine.
  CachedModel cached_model();
  /// From now on texts go by cycles where few are being written. `cycles` outlives all steps; null: none do.
  void go_by(Cycles* cycles) { cycles_ = cycles; }

  /// UserError, and nothing changes: the prompt is empty, holds ids outside of EngineOptions::vocab, is
  /// longer than the model's context or than the cache ever holds, or an option is out of range.
  RequestId submit(Request request);
  /// Ends a request; its blocks are free at once, and no event of it follows. Ids that are gone are ignored.
  void cancel(RequestId id);

  /// The same for a text that is complete as it stands: what its last event would have been.
  Event stop(RequestId id);

  /// For measurements of long texts: a request that waits goes on as if all of its prompt but the last token
  /// were computed, with random numbers for keys and values and the share `kept` of them in routed layers.
  /// InternalError: the request does not wait, or has no place.
  void assume_computed(RequestId id, double kept);

  bool idle() const { return waiting_.empty() && running_.empty() && events_.empty(); }
  /// One pass over what there is to do; nothing when idle. A request that fails ends with an event, and the
  /// others go on; where memory runs out, those of this pass. Any other error is thrown, and ends those of
  /// this pass without an event; what had happened before it comes with the next step.
  std::vector<Event> step();

  EngineStats stats() const;
  void observe_logits(LogitsObserver observer) { observer_ = std::move(observer); }
  std::int64_t context() const { return model_.config().max_seq_len; }

 private:
  struct Running {
    RequestId id = 0;
    Request request;
    std::vector<std::int32_t> ids;  // the prompt, then what was chosen
    SequenceId sequence = -1;       // -1: waits
    std::int64_t computed = 0;      // of ids, in the cache
    std::int64_t scored = 1;        // of the prompt's ids, how many have their logprob (the first has none)
    bool finished = false;
    // Of its present sequence:
    bool begun = false;           // a pass had rows of it
    bool had_cycles = false;      // which may have taken blocks that passes would not have,
    bool went_ahead = false;      // as steps ahead may
    std::int64_t adopted = 0;     // of ids, found in the cache
    std::int64_t remembered = 0;  // of ids, to be found by others
    // Of all:
    std::int64_t cached = -1;  // of the prompt, found in the cache by the first sequence; -1: none has begun
    bool is_assumed = false;   // its entries are no keys and values of its ids
    bool recomputes = false;   // shared blocks, or those of cycles or steps ahead, left it no room
    std::int64_t told = 0;     // of ids, those whose routing an event has had
    std::int64_t verifications = 0, verified_tokens = 0;  // cycles, and what came of them

    /// Ids that the cache does not have yet, of those that anything follows from.
    std::int64_t left() const {
      return static_cast<std::int64_t>(ids.size()) - (request.max_tokens == 0 ? 1 : 0) - computed;
    }
    std::int64_t generated() const { return static_cast<std::int64_t>(ids.size() - request.prompt.size()); }
  };
  struct Part {  // of a pass
    Running* request = nullptr;
    std::int64_t rows = 0;
  };

  bool admit();
  std::int64_t promised_groups() const;
  std::vector<Part> schedule();
  void make_room(std::vector<Part>& parts, std::vector<Event>& events);
  void preempt(Running& victim);
  void release(Running& r);
  std::int64_t may_adopt(const Running& r) const;
  void adopt(Running& r);
  void begin(Running& r);
  void remember(Running& r);
  double prefix_key(const Running& r) const;
  void run(std::span<const Part> parts, std::vector<Event>& events,
           void (Engine::*how)(std::span<const Part>, std::vector<Event>&));
  void run_pass(std::span<const Part> parts, std::vector<Event>& events);
  void run_whole(std::span<const Part> parts, std::vector<Event>& events);
  void launch_ahead(std::span<const Part> parts, std::vector<StepRow> rows,
                    std::span<const std::int32_t> places);
  void run_cycles(std::span<const Part> parts, std::vector<Event>& events);
  void run_cycle(std::span<const Part> parts, std::vector<Event>& events);
  bool few_are_written() const;
  bool goes_by_cycles(const Part& part) const;
  bool goes_whole(const Part& part) const;
  std::int64_t most_whole_rows() const;
  struct Wanted {  // a row of a pass that something follows from
    const Running* request = nullptr;
    std::int32_t row = 0;
    std::int64_t position = 0;  // of the id that follows
    bool needs_logits = false;  // more than the device can choose from
    TokenPick pick;
    std::span<const float> logits;  // if it needs them
  };
  bool device_chooses(const Running& r) const;
  double threshold_of(const Running& r) const {
    return r.request.threshold.value_or(options_.rule.threshold);
  }
  Causal rule_of(std::span<const Part> parts) const;
  [[nodiscard]] std::vector<float> choose_or_read(const Tensor& hidden, std::vector<Wanted>& wanted);
  void use_logits(Running& r, std::int64_t position, std::span<const float> logits, Event& event);
  void choose(Running& r, std::span<const float> logits, Event& event);
  void take(Running& r, const SampledToken& next, Event& event);
  static void fail(std::span<const Part> parts, const std::string& error, std::vector<Event>& events);
  void give_away(std::span<const Part> parts);
  void finish_scored(std::vector<Event>& events);
  void finish(Running& r, Event& event);
  void describe(const Running& r, Event& event) const;
  void tell_routing(Running& r, Event& event) const;
  void drop_finished();

  Context& c_;
  const Transformer& model_;
  EngineOptions options_;
  KvCache cache_;
  std::unique_ptr<PrefixCache> prefixes_;  // null: there is none
  std::unique_ptr<WholeStep> whole_;       // null: there is none
  Cycles* cycles_ = nullptr;               // likewise
  std::list<Running> waiting_, running_;   // both in the order of their submission
  RequestId next_ = 1;
  EngineStats stats_;
  LogitsObserver observer_;
  std::vector<Event> events_;  // of the step at hand, or of one that an error has cut off
};

}  // namespace fathom
