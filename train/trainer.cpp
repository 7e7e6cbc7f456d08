#include "train/trainer.h"

#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <fstream>
#include <optional>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/flops/flops.h"
#include "src/io/atomic_file.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "train/metrics/recorder.h"
#include "train/resume.h"
#include "train/schedule.h"
#include "train/signals.h"
#include "train/step.h"

namespace fathom {

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::shared_ptr<const TokenStore> open_store(const std::string& path, const char* key) {
  if (path.empty())
    throw UsageError(fmt::format("{} names no token store.", key), "Make one with fathom data prepare.");
  return std::make_shared<const TokenStore>(TokenStore::open(path));
}

// The stores of a run, checked against each other and the tokenizer.
struct Data {
  std::shared_ptr<const TokenStore> train;
  std::shared_ptr<const TokenStore> valid;  // null: no evaluation

  explicit Data(const DataConfig& config) : train(open_store(config.train, "data.train")) {
    if (!config.valid.empty()) valid = open_store(config.valid, "data.valid");
    if (valid && valid->tokenizer_hash() != train->tokenizer_hash()) {
      throw UserError(
          fmt::format("data.valid ({}) was made with another tokenizer ({}) than data.train ({}).",
                      config.valid, valid->tokenizer_hash(), train->tokenizer_hash()),
          "Prepare both with one tokenizer; --valid-fraction makes the pair.");
    }
    if (!config.tokenizer.empty())
      require_tokenizer(*train, *load_tokenizer(config.tokenizer), config.tokenizer);
  }
};

DataLoader loader_of(const std::shared_ptr<const TokenStore>& store, const Config& config) {
  return DataLoader(store, config.train.seq_len, config.data.document_mask);
}

const char* signal_name(int signal) {
  switch (signal) {
    case SIGINT:
      return "SIGINT";
    case SIGHUP:
      return "SIGHUP";
    default:
      return "SIGTERM";
  }
}

Config resolved(const Config& config, const Data& data) {
  Config r = resolve(config, data.train->vocab_size());
  validate(r);
  return r;
}

// What a spike is measured against: a running mean that starts as the plain mean.
void average(TrainingState& s, double loss) {
  constexpr double kSlowest = 0.02;
  ++s.steps_averaged;
  const double share = std::max(1.0 / static_cast<double>(s.steps_averaged), kSlowest);
  s.loss_average += share * (loss - s.loss_average);
}

class Run {
 public:
  Run(const Config& config, const TrainOptions& options, std::shared_ptr<Backend> backend,
      std::ostream& console)
      : options_(options),
        data_(config.data),
        config_(resolved(config, data_)),
        horizon_(plan_horizon(config_)),
        folder_(RunFolder::create_or_open(options.run_dir)),
        context_(std::move(backend), config_.train.precision == "bf16" ? DType::BF16 : DType::F32),
        model_(context_, config_.model, config_.routing, true),
        optimizer_(context_, model_.parameters(), config_.train),
        schedule_(config_.train, horizon_.steps),
        loader_(loader_of(data_.train, config_)),
        stepper_(context_, model_, config_,
                 [this](std::int64_t first, std::int64_t count) {
                   return loader_.shuffled(config_.seed, first, count);
                 }),
        console_(console, {.kind = options.console_is_terminal ? ConsoleKind::Terminal : ConsoleKind::Pipe,
                           .total_steps = horizon_.steps,
                           .width = options.console_width}) {
    if (data_.valid) valid_.emplace(loader_of(data_.valid, config_));
    model_.set_recompute(config_.train.recompute);
    facts_ = make_facts();
  }

  TrainResult run() {
    if (start()) return result_;
    try {
      return go_on();
    } catch (const std::exception& e) {
      record_failure(e.what());
      throw;
    }
  }

 private:
  TrainResult go_on() {
    if (options_.peak_flops_per_s) peak_ = options_.peak_flops_per_s(config_);
    if (result_.resumed_at > 0 && saved_step_ == 0)
      save();  // from another run's checkpoint: now it is this run's
    bool stopped = false;
    if (evaluation_is_missing()) stopped = !evaluate_now();
    while (!stopped && state_.step < horizon_.steps) stopped = !step();
    return stopped ? stop() : finish();
  }

  // The disk may refuse this as well; then the reason that is on its way to the user has to do.
  void record_failure(const std::string& why) {
    console_.finish();
    try {
      end(RunStatus::Failed, why);
    } catch (const UserError&) {
      log_console_->message("This run's end could not be recorded.");
    }
  }

  // Returns true when there is nothing to do.
  bool start() {
    if (options_.resume == ResumeMode::Never && folder_.has_history()) {
      throw UserError(
          fmt::format("{} already holds a run, and --resume never was given.", folder_.path().string()),
          "Choose another --run-dir, or --resume auto to go on with it.");
    }
    require_same_config(folder_, config_);
    std::vector<std::string> warnings;
    if (options_.resume == ResumeMode::From && folder_.checkpoints().empty()) {
      start_from(find_checkpoint(options_.resume_from));
    } else if (auto resumed =
                   resume_from_folder(folder_, context_, model_.parameters(), optimizer_.state())) {
      warnings = resumed->damaged;
      use(*resumed);
    } else {
      model_.initialise(context_, config_.seed);
    }
    if (state_.step >= horizon_.steps && ended_done()) {
      result_.already_done = true;
      result_.final_loss = state_.loss_average;
      result_.state = state_;
      result_.message =
          fmt::format("{} is done: {} steps. Nothing to do.", folder_.path().string(), state_.step);
      return true;
    }
    // A start is an event of its own only when nothing precedes it: a run killed before its first checkpoint
    // begins anew, and says so by a second start.
    write_file(folder_.config_path().string(), to_yaml(config_));
    if (options_.plan) write_file(folder_.plan_path().string(), options_.plan(config_) + "\n");
    recorder_.emplace(folder_, state_.step, console_);
    restore_evaluations();
    log_.open(folder_.log_path(), std::ios::app);
    if (!log_) {
      throw UserError(fmt::format("cannot write {}: {}.", folder_.log_path().string(), std::strerror(errno)),
                      "Check the permissions of the run folder.");
    }
    log_console_.emplace(log_, ConsoleOptions{.kind = ConsoleKind::Pipe, .total_steps = horizon_.steps});
    for (const std::string& warning : warnings) message("Warning: passed over a checkpoint: " + warning);
    for (const std::string& note : config_notes(config_)) message("Note: " + note);
    message(memory_table());
    EventRecord record;
    record.kind = state_.step > 0 ? EventKind::Resume : EventKind::Start;
    record.step = state_.step;
    record.seconds = state_.seconds;
    record.facts = facts_;
    if (state_.step > 0) record.checkpoint = result_.checkpoint.filename().string();
    record_all(record);
    return false;
  }

  void use(const Resumed& resumed) {
    require_same_store(resumed.meta, data_.train->info(), data_.train->content_hash(), config_.data.train);
    state_ = resumed.meta.state;
    saved_step_ = state_.step;
    result_.resumed_at = state_.step;
    result_.checkpoint = resumed.checkpoint;
  }

  // Another run's checkpoint begins this run.
  void start_from(const std::filesystem::path& path) {
    use({path, load_checkpoint(path, context_, model_.parameters(), &optimizer_.state()), {}});
    saved_step_ = 0;
    if (state_.step < horizon_.steps) return;
    throw UserError(
        fmt::format("{} is at step {}, and this config ends at step {}: there is nothing to train.",
                    path.string(), state_.step, horizon_.steps),
        "Give a longer horizon.");
  }

  // What the evaluations up to here found, which a checkpoint from before the last one does not know.
  void restore_evaluations() {
    for (const EvalRecord& e : read_metrics(folder_.metrics_path()).evals) {
      evaluated_step_ = e.step;
      keep_best(e.step, e.judged_loss());
    }
  }

  void keep_best(std::int64_t step, double loss) {
    if (!std::isfinite(loss) || (state_.best_step > 0 && loss >= state_.best_val_loss)) return;
    state_.best_val_loss = loss;
    state_.best_step = step;
  }

  bool ended_done() const {
    if (!std::filesystem::exists(folder_.metrics_path())) return false;
    const Metrics metrics = read_metrics(folder_.metrics_path());
    return !metrics.events.empty() && metrics.events.back().status == RunStatus::Done;
  }

  // One optimizer step and what is due after it. False: stop.
  bool step() {
    const auto begin = Clock::now();
    const std::int64_t number = state_.step + 1;
    const bool logged = number % config_.train.log_every == 0 || number == 1 || number == horizon_.steps;
    const std::optional<StepOutcome> outcome = stepper_.gradients(state_.step, state_.sequences);
    if (!outcome) return false;
    const double lr = schedule_.at(state_.step);
    const std::optional<bool> update = judge(*outcome);
    if (!update) return false;
    if (*update) {
      optimizer_.update(context_, model_.parameters(), outcome->norms, lr, number);
      average(state_, outcome->loss);
    }
    const double seconds = since(begin);
    state_.step = number;
    state_.tokens += config_.train.batch_tokens;
    state_.sequences += config_.train.batch_tokens / config_.train.seq_len;
    state_.flops += train_flops_per_step(config_);
    state_.seconds += seconds;
    steps_since_log_ += 1;
    seconds_since_log_ += seconds;
    if (logged) log_step(*outcome, lr);
    if (due(config_.train.eval_every) && state_.step < horizon_.steps && !evaluate_now()) return false;
    if (due(config_.train.checkpoint_every) && state_.step < horizon_.steps) save();
    return true;
  }

  bool due(std::int64_t every) const { return every > 0 && state_.step % every == 0; }

  // Whether to apply the step's update; empty: stop the run (result_ says why).
  std::optional<bool> judge(const StepOutcome& outcome) {
    constexpr std::int64_t kSettled = 20;  // steps before the running mean means something
    const bool broken = !outcome.finite();
    const bool spike = !broken && state_.steps_averaged >= kSettled &&
                       outcome.loss > config_.train.spike_factor * state_.loss_average;
    if (!broken && !spike) {
      state_.skipped_in_a_row = 0;
      return true;
    }
    const std::int64_t number = state_.step + 1;
    const std::string what =
        broken ? fmt::format("step {}: loss {}, gradient norm {}: first not finite: {}", number, outcome.loss,
                             outcome.norms.model, stepper_.trace(state_.step, state_.sequences))
               : fmt::format("step {}: loss {:.4f} is more than {} times its running mean {:.4f}", number,
                             outcome.loss, config_.train.spike_factor, state_.loss_average);
    EventRecord record;
    record.kind = broken ? EventKind::Nan : EventKind::Spike;
    record.step = state_.step;
    record.seconds = state_.seconds;
    constexpr std::int64_t kMostSkipped = 10;
    const OnSpike policy = config_.train.on_spike;
    if (policy == OnSpike::Warn && spike) {
      record.message = what + " (warned: train.on_spike)";
      record_all(record);
      return true;
    }
    if (policy != OnSpike::Stop && state_.skipped_in_a_row < kMostSkipped) {
      ++state_.skipped_in_a_row;
      record.message = what + " (its update is skipped)";
      record_all(record);
      return false;
    }
    record.message = what + " (the run stops)";
    record_all(record);
    result_.status = RunStatus::Failed;
    result_.message = fmt::format(
        "Training stopped at {}.{} {}", what, state_.step > 0 ? " The state before that step is saved." : "",
        policy == OnSpike::Stop
            ? "Go on past it with --set train.on_spike=skip, or start another run with a lower train.lr or a "
              "longer "
              "train.warmup."
            : fmt::format(
                  "That were {} skipped steps in a row. Start another run with a lower train.lr or a longer "
                  "train.warmup.",
                  kMostSkipped));
    return std::nullopt;
  }

  void log_step(const StepOutcome& outcome, double lr) {
    StepRecord r;
    r.step = state_.step;
    r.tokens = state_.tokens;
    r.flops = state_.flops;
    r.loss = outcome.loss;
    r.loss_average = state_.loss_average;
    r.lr = lr;
    r.grad_norm = outcome.norms.model;
    r.tokens_per_s = static_cast<double>(steps_since_log_ * config_.train.batch_tokens) / seconds_since_log_;
    r.flops_per_s =
        static_cast<double>(steps_since_log_) * train_flops_per_step(config_) / seconds_since_log_;
    if (peak_ > 0) r.mfu = r.flops_per_s / peak_;
    r.seconds = state_.seconds;
    r.memory_bytes = static_cast<double>(context_.allocator().use().total_peak);
    if (config_.routing.has_aux_loss()) r.aux_loss = outcome.aux;
    if (config_.routing.has_predictor()) r.predictor_loss = outcome.predictor;
    r.routed_layers = facts_.routed_layers;
    double accuracy = 0;
    for (const RouterSummary& s : outcome.routing) {
      r.routed_fraction.push_back(s.members);
      r.router.push_back({s.mean, s.min, s.max, s.above_half});
      accuracy += s.accuracy() / static_cast<double>(outcome.routing.size());
    }
    if (!outcome.routing.empty() && config_.routing.causal.method != CausalMethod::None) {
      r.predictor_accuracy = accuracy;
    }
    steps_since_log_ = 0;
    seconds_since_log_ = 0;
    recorder_->record(r);
    log_console_->step(r);
  }

  bool evaluation_is_missing() const {
    return due(config_.train.eval_every) && state_.step > 0 && state_.step < horizon_.steps;
  }

  // False: a signal came before it was through.
  bool evaluate_now() {
    if (!valid_ || evaluated_step_ == state_.step) return true;
    EvalOptions options;
    options.tokens = config_.train.eval_tokens;
    options.batch = config_.micro_batch_sequences();
    options.stop = stop_requested;
    const std::optional<EvalResult> e = evaluate(context_, model_, config_, *valid_, options);
    if (!e) return false;
    EvalRecord r;
    r.step = state_.step;
    r.tokens = state_.tokens;
    r.flops = state_.flops;
    r.seconds = state_.seconds;
    if (e->layers.empty()) {
      r.val_loss = e->loss;
    } else {
      r.val_topk = e->loss;
      r.val_causal = e->causal;
    }
    if (e->bytes > 0) r.bits_per_byte = e->bits_per_byte();
    if (e->causal) {
      r.routed_layers = e->layers;
      r.realised_capacity = e->realised_capacity;
      r.router_recall_by_layer = e->recall;
      r.router_precision_by_layer = e->precision;
      const double layers = static_cast<double>(e->layers.size());
      double recall = 0;
      double precision = 0;
      for (double x : e->recall) recall += x / layers;
      for (double x : e->precision) precision += x / layers;
      r.router_recall = recall;
      r.router_precision = precision;
    }
    if (e->causal_flops_per_token > 0) r.causal_flops_per_token = e->causal_flops_per_token;
    keep_best(state_.step, e->judged());
    evaluated_step_ = state_.step;
    recorder_->record(r);
    log_console_->evaluation(r);
    return true;
  }

  void save() {
    if (saved_step_ == state_.step) return;
    recorder_->sync();
    const std::filesystem::path path = folder_.checkpoint_path(state_.step);
    CheckpointMeta meta;
    meta.state = state_;
    meta.config_yaml = to_yaml(config_);
    meta.tokenizer_kind = data_.train->info().tokenizer_kind;
    meta.tokenizer_hash = data_.train->tokenizer_hash();
    meta.store_hash = data_.train->content_hash();
    meta.git_sha = options_.git_sha;
    save_checkpoint(path, context_, model_.parameters(), optimizer_.state(), meta);
    folder_.set_latest(state_.step);
    folder_.prune(config_.train.keep_checkpoints);
    saved_step_ = state_.step;
    result_.checkpoint = path;
    EventRecord record;
    record.kind = EventKind::Checkpoint;
    record.step = state_.step;
    record.seconds = state_.seconds;
    record.checkpoint = path.filename().string();
    record_all(record);
  }

  TrainResult finish() {
    if (!evaluate_now()) return stop();
    save();
    return end(RunStatus::Done, "");
  }

  TrainResult stop() {
    const bool failed = result_.status == RunStatus::Failed;
    if (state_.step > 0) save();
    std::string message = result_.message;
    if (!failed) {
      message = fmt::format(
          "Stopped by {} after step {} of {}. The same command with --resume auto goes on from there.",
          signal_name(stop_signal()), state_.step, horizon_.steps);
      EventRecord record;
      record.kind = EventKind::Stop;
      record.step = state_.step;
      record.seconds = state_.seconds;
      record.message = message;
      record_all(record);
    }
    return end(failed ? RunStatus::Failed : RunStatus::Stopped, message);
  }

  TrainResult end(RunStatus status, const std::string& message) {
    EventRecord record;
    record.kind = EventKind::End;
    record.step = state_.step;
    record.seconds = state_.seconds;
    record.message = message;
    record.status = status;
    record.tokens = state_.tokens;
    record.flops = state_.flops;
    record.final_loss = state_.loss_average;
    if (state_.best_step > 0) {
      record.best_val_loss = state_.best_val_loss;
      record.best_step = state_.best_step;
    }
    record_all(record);
    recorder_->sync();
    console_.finish();
    result_.status = status;
    result_.state = state_;
    result_.final_loss = state_.loss_average;
    result_.message = message;
    return result_;
  }

  void record_all(const EventRecord& record) {
    recorder_->record(record);
    log_console_->event(record);
  }

  void message(const std::string& text) {
    console_.message(text);
    log_console_->message(text);
  }

  RunFacts make_facts() const {
    RunFacts facts;
    const ParameterCount count = count_parameters(config_);
    facts.params_total = count.total;
    facts.params_active = count.active;
    facts.flops_per_token_forward = forward_flops_per_token(config_).total();
    facts.flops_per_token_train = train_flops_per_token(config_).total();
    facts.total_steps = horizon_.steps;
    facts.batch_tokens = config_.train.batch_tokens;
    facts.seq_len = config_.train.seq_len;
    facts.depth = config_.model.depth;
    facts.routed_layers = model_.routed_layers();
    if (!facts.routed_layers.empty()) facts.capacity = config_.routing.capacity;
    facts.train_store_tokens = data_.train->num_tokens();
    facts.tokenizer_hash = data_.train->tokenizer_hash();
    if (data_.valid) facts.valid_source_hash = data_.valid->source_hash();
    facts.seed = config_.seed;
    facts.device = context_.backend().description();
    facts.git_sha = options_.git_sha;
    return facts;
  }

  // What is allocated, what the step will take, and whether the machine has it.
  std::string memory_table() {
    const MemoryUse use = context_.allocator().use();
    const MemoryEstimate estimate = estimate_memory(config_);
    std::string table = "Memory: ";
    for (const MemoryTag tag : {MemoryTag::Parameters, MemoryTag::Gradients, MemoryTag::Optimizer}) {
      table += fmt::format("{} {}, ", name_of(tag),
                           format_bytes(static_cast<double>(use.now[static_cast<std::size_t>(tag)])));
    }
    table += fmt::format("activations about {}, head about {}", format_bytes(estimate.activations),
                         format_bytes(estimate.logits_chunk));
    const auto there = static_cast<double>(options_.total_memory);
    if (there <= 0 || estimate.total() <= there) return table;
    const std::string more =
        fmt::format("That is more than this {}'s {}", context_.backend().is_cpu() ? "machine" : "GPU",
                    format_bytes(there));
    const std::string hint = "lower train.micro_batch or set train.recompute: block";
    // A machine may swap; a GPU does not, and the estimate is within a tenth.
    constexpr double kMargin = 1.1;
    if (!context_.backend().is_cpu() && estimate.total() > kMargin * there) {
      throw UserError(fmt::format("{}. {}.", table, more), fmt::format("To train this, {}.", hint));
    }
    return table + fmt::format(". {}: {}", more, hint);
  }

  TrainOptions options_;
  Data data_;
  Config config_;
  Horizon horizon_;
  double peak_ = 0;  // FLOP/s of the machine; 0: unknown
  RunFolder folder_;
  Context context_;
  Transformer model_;
  AdamW optimizer_;
  LrSchedule schedule_;
  DataLoader loader_;
  std::optional<DataLoader> valid_;
  StepRunner stepper_;
  Console console_;
  std::ofstream log_;
  std::optional<Console> log_console_;
  std::optional<Recorder> recorder_;
  RunFacts facts_;
  TrainingState state_;
  TrainResult result_;
  std::int64_t saved_step_ = 0;      // of this folder's newest checkpoint
  std::int64_t evaluated_step_ = 0;  // of the last evaluation
  std::int64_t steps_since_log_ = 0;
  double seconds_since_log_ = 0;
};

}  // namespace

Config check_training(const Config& config) {
  const Data data(config.data);
  const Config r = resolved(config, data);
  loader_of(data.train, r);
  if (data.valid) loader_of(data.valid, r);
  return r;
}

TrainResult train(const Config& config, const TrainOptions& options, std::shared_ptr<Backend> backend,
                  std::ostream& console) {
  const StopSignals
      signals;  // first of all: a signal while the data is read ends the run as well as a later one
  Run run(config, options, std::move(backend), console);
  return run.run();
}

}  // namespace fathom
