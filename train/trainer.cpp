#include "train/trainer.h"

#include <cmath>
#include <csignal>
#include <new>
#include <optional>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/core/stopwatch.h"
#include "src/flops/flops.h"
#include "src/io/atomic_file.h"
#include "train/inputs.h"
#include "train/memory_table.h"
#include "train/metrics/recorder.h"
#include "train/records.h"
#include "train/same_run.h"
#include "train/same_start.h"
#include "train/schedule.h"
#include "train/signals.h"
#include "train/spikes.h"
#include "train/step.h"
#include "train/together.h"

namespace fathom {

namespace {

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

class Run {
 public:
  Run(const Config& config, const TrainOptions& options, std::shared_ptr<Backend> backend,
      std::ostream& console)
      : options_(options),
        ranks_(options.ranks ? std::make_shared<Ranks>(options.ranks) : std::make_shared<Ranks>()),
        inputs_(open_alike(config)),
        share_(share_of(config_, ranks_->size())),
        steps_(plan_horizon(config_).steps),
        folder_(ranks_->leads() ? std::optional(RunFolder::create_or_open(options.run_dir)) : std::nullopt),
        context_(std::move(backend), config_.train.precision == "bf16" ? DType::BF16 : DType::F32),
        model_(context_, config_.model, config_.routing, true),
        optimizer_(context_, config_.train, Shards(model_.parameters(), ranks_->rank(), ranks_->size())),
        schedule_(config_.train, steps_),
        loader_(inputs_.train_loader()),
        valid_(inputs_.valid_loader()),
        stepper_(
            context_, model_, optimizer_, share_,
            [this](std::int64_t first, std::int64_t count) {
              return loader_.shuffled(config_.seed, first, count);
            },
            ranks_),
        console_(ranks_->leads() ? console : silent_,
                 {.kind = options.console_is_terminal ? ConsoleKind::Terminal : ConsoleKind::Pipe,
                  .total_steps = steps_,
                  .width = options.console_width}) {
    model_.set_recompute(config_.train.recompute);
  }

  TrainResult run() {
    if (start()) return result_;
    try {
      TrainResult result = go_on();
      is_over_ = true;
      ranks_->comm().barrier();  // nobody leaves while another may still fail
      return result;
    } catch (const std::bad_alloc&) {
      record_failure("out of memory");
      throw;
    } catch (const std::exception& e) {
      record_failure(e.what());
      throw;
    }
  }

 private:
  TrainingInputs open_alike(const Config& config) {
    TrainingInputs inputs = TrainingInputs::open(config);
    ranks_->comm().set_timeout(config.train.rank_timeout);
    require_same_start(*ranks_, inputs, options_.build);
    return inputs;
  }

  RankTrainee trainee() { return {*ranks_, context_, model_, optimizer_}; }

  // Returns true when there is nothing to do.
  bool start() {
    const Beginning beginning =
        begin_together(folder_ ? &*folder_ : nullptr, options_.resume, inputs_, trainee());
    state_ = beginning.state;
    saved_step_ = beginning.borrowed ? 0 : state_.step;
    result_.resumed_at = state_.step;
    result_.checkpoint = beginning.checkpoint;
    const bool done = folder_ && state_.step >= steps_ && is_done(folder_->path());
    if (value_of_rank_0(ranks_->comm(), done)) {
      result_.already_done = true;
      result_.final_loss = state_.loss_average;
      result_.state = state_;
      result_.message =
          fmt::format("{} is done: {} steps. Nothing to do.", options_.run_dir.string(), state_.step);
      return true;
    }
    // It refuses what surely does not fit: before the first file that a later start would find here.
    const int sharing = context_.backend().is_cpu() ? ranks_->comm().local_size() : 1;
    const std::string memory =
        memory_table(context_, share_, options_.total_memory / sharing, ranks_->size());
    if (folder_) prepare_folder(beginning, memory);
    evaluated_step_ = value_of_rank_0(ranks_->comm(), evaluated_step_);
    state_ = value_of_rank_0(ranks_->comm(), state_);
    return false;
  }

  void prepare_folder(const Beginning& beginning, const std::string& memory) {
    if (!says_the_same(folder_->config_path(), inputs_))
      write_file(folder_->config_path().string(), to_yaml(config_));
    if (!inputs_.tokenizer_model.empty())
      write_file(folder_->tokenizer_path(inputs_.train->info().tokenizer_kind).string(),
                 inputs_.tokenizer_model);
    if (options_.plan) write_file(folder_->plan_path().string(), options_.plan(config_) + "\n");
    recorder_.emplace(*folder_, state_.step, steps_, console_);
    restore_evaluations();
    announce(beginning, memory);
  }

  // Rank 0 alone has a recorder.
  template <typename Record>
  void record(const Record& what) {
    if (recorder_) recorder_->record(what);
  }

  // A start is an event of its own only when nothing precedes it: a run killed before its first checkpoint
  // begins anew, and says so by a second start.
  void announce(const Beginning& beginning, const std::string& memory) {
    for (const std::string& warning : beginning.damaged)
      recorder_->message("Warning: passed over a checkpoint: " + warning);
    for (const std::string& note : config_notes(config_)) recorder_->message("Note: " + note);
    recorder_->message(data_line(inputs_, steps_));
    recorder_->message(memory);
    if (!ranks_->alone()) recorder_->message("Ranks: " + ranks_->comm().description());
    EventRecord record = event_at(state_, state_.step > 0 ? EventKind::Resume : EventKind::Start);
    record.facts =
        facts_of(inputs_, model_.routed_layers(), context_.backend().description(), options_.git_sha);
    if (state_.step > 0) record.checkpoint = beginning.checkpoint.filename().string();
    recorder_->record(record);
  }

  // What the evaluations up to here found, which a checkpoint from before the last one does not know.
  void restore_evaluations() {
    for (const EvalRecord& e : read_metrics(folder_->metrics_path()).evals) {
      evaluated_step_ = e.step;
      keep_best(e.step, e.judged_loss());
    }
  }

  void keep_best(std::int64_t step, double loss) {
    if (!std::isfinite(loss) || (state_.best_step > 0 && loss >= state_.best_val_loss)) return;
    state_.best_val_loss = loss;
    state_.best_step = step;
  }

  TrainResult go_on() {
    if (options_.peak_flops_per_s && ranks_->leads())
      peak_ = ranks_->size() * options_.peak_flops_per_s(share_);
    if (state_.step > 0 && saved_step_ == 0) save();  // from another run's checkpoint: now it is this run's
    bool stopped = false;
    if (evaluation_is_missing()) stopped = !evaluate_now();
    while (!stopped && state_.step < steps_) stopped = !step();
    return stopped ? stop() : finish();
  }

  static bool due_at(std::int64_t step, std::int64_t every) { return every > 0 && step % every == 0; }
  bool due(std::int64_t every) const { return due_at(state_.step, every); }
  bool evaluation_is_missing() const {
    return due(config_.train.eval_every) && state_.step > 0 && state_.step < steps_;
  }

  // What needs the parameters as they are after so many steps, and no later.
  bool parameters_are_read_after(std::int64_t number) const {
    return number >= steps_ || (valid_ && due_at(number, config_.train.eval_every)) ||
           due_at(number, config_.train.checkpoint_every);
  }

  std::int64_t sequences_of_a_step() const { return config_.train.batch_tokens / config_.train.seq_len; }

  // False: a stop was asked for.
  bool launch(std::int64_t step) {
    const std::int64_t ahead = (step - state_.step) * sequences_of_a_step();
    return stepper_.launch({step, state_.sequences + ahead, schedule_.at(step), mean_of(state_)});
  }

  // One optimizer step and what is due after it. False: stop. The next step may be under way when it returns;
  // one whose start a signal forbade is missed in the next call.
  bool step() {
    const std::int64_t number = state_.step + 1;
    const bool logged = number % config_.train.log_every == 0 || number == 1 || number == steps_;
    // What is under way already began behind the last report.
    if (!stepper_.launched(state_.step)) {
      watch_.restart();
      if (!launch(state_.step)) return false;
    }
    if (stepper_.runs_ahead() && !parameters_are_read_after(number)) launch(number);
    const StepOutcome outcome = stepper_.read();
    if (!outcome.applied) stepper_.forget();
    const double lr = schedule_.at(state_.step);
    const Judgement judgement = judge(config_.train, state_, outcome, [this] { return trace(); });
    if ((judgement.verdict == StepVerdict::Apply) != outcome.applied)
      throw InternalError("[step] the device and the host do not agree whether the update is made");
    if (judgement.event) record(*judgement.event);
    if (judgement.verdict == StepVerdict::StopRun) {
      result_.status = RunStatus::Failed;
      result_.message = judgement.failure;
      return false;
    }
    if (judgement.verdict == StepVerdict::Apply) average(state_, outcome.loss);
    const double seconds = watch_.seconds();
    watch_.restart();
    state_.step = number;
    state_.tokens += config_.train.batch_tokens;
    state_.sequences += sequences_of_a_step();
    state_.flops += train_flops_per_step(config_);
    state_.seconds += seconds;
    unlogged_.steps += 1;
    unlogged_.seconds += seconds;
    if (logged) log_step(outcome, lr);
    if (due(config_.train.eval_every) && state_.step < steps_ && !evaluate_now()) return false;
    if (due(config_.train.checkpoint_every) && state_.step < steps_) save();
    return true;
  }

  // Of several ranks, what the first one found whose own share has the culprit.
  std::string trace() {
    const std::string own = stepper_.trace(state_.step, state_.sequences);
    if (ranks_->alone()) return own;
    const std::vector<std::string> all = ranks_->comm().gather(own);
    for (std::size_t r = 0; r < all.size(); ++r) {
      if (!all[r].starts_with(kNoSingleOp)) return fmt::format("{} (rank {})", all[r], r);
    }
    return own;
  }

  void log_step(const StepOutcome& outcome, double lr) {
    unlogged_.lr = lr;
    unlogged_.peak_flops_per_s = peak_;
    note_memory();
    const StepRecord record = step_record(config_, state_, outcome, unlogged_, model_.routed_layers());
    unlogged_ = {};
    this->record(record);
    const std::optional<std::string> slow = ranks_->slow_rank_since();
    if (slow && recorder_) recorder_->message("Warning: slow: " + *slow + ".");
  }

  // The peak of tensors can only grow, and grows by tensors alone: what leaks beside them shows in the
  // others.
  void note_memory() {
    const MemoryUse use = context_.allocator().use();
    const Backend& backend = context_.backend();
    unlogged_.memory_bytes = static_cast<double>(use.total_peak);
    unlogged_.memory_held_bytes =
        static_cast<double>(use.total_now + use.cached) + static_cast<double>(backend.workspace_bytes());
    if (const std::int64_t free = backend.free_memory_bytes(); free > 0)
      unlogged_.device_used_bytes = static_cast<double>(backend.memory_bytes() - free);
  }

  // False: a signal came before it was through.
  bool evaluate_now() {
    if (!valid_ || evaluated_step_ == state_.step) return true;
    EvalOptions options;
    options.tokens = config_.train.eval_tokens;
    options.batch = share_.micro_batch_sequences();
    options.stop = [this] { return ranks_->stop_requested(); };
    options.ranks = &ranks_->comm();
    const std::optional<EvalResult> result = evaluate(context_, model_, config_, *valid_, options);
    if (!result) return false;
    keep_best(state_.step, result->judged());
    evaluated_step_ = state_.step;
    record(evaluation_record(state_, *result));
    return true;
  }

  void save() {
    if (saved_step_ == state_.step) return;
    saved_step_ = state_.step;
    CheckpointMeta meta;
    meta.state = state_;
    meta.config_yaml = to_yaml(config_);
    meta.tokenizer_kind = inputs_.train->info().tokenizer_kind;
    meta.tokenizer_hash = inputs_.train->tokenizer_hash();
    meta.store_hash = inputs_.train->content_hash();
    meta.git_sha = options_.git_sha;
    if (recorder_) recorder_->sync();
    const std::filesystem::path path = folder_ ? folder_->checkpoint_path(state_.step) : "";
    save_together(path, trainee(), meta);
    if (!folder_) return;
    folder_->set_latest(state_.step);
    folder_->prune(config_.train.keep_checkpoints);
    result_.checkpoint = path;
    EventRecord saved = event_at(state_, EventKind::Checkpoint);
    saved.checkpoint = path.filename().string();
    record(saved);
  }

  TrainResult finish() {
    if (!evaluate_now()) return stop();
    save();
    return end(RunStatus::Done, "");
  }

  TrainResult stop() {
    if (state_.step > 0) save();
    if (result_.status == RunStatus::Failed) return end(RunStatus::Failed, result_.message);
    const std::string message = fmt::format(
        "Stopped by {} after step {} of {}. The same command with --resume auto goes on from there.",
        signal_name(ranks_->stop_signal()), state_.step, steps_);
    record(event_at(state_, EventKind::Stop, message));
    return end(RunStatus::Stopped, message);
  }

  TrainResult end(RunStatus status, const std::string& message) {
    record(end_record(state_, status, message));
    if (recorder_) recorder_->sync();
    console_.finish();
    result_.status = status;
    result_.state = state_;
    result_.final_loss = state_.loss_average;
    result_.message = message;
    return result_;
  }

  // The disk may refuse this as well; then the reason that is on its way to the user has to do. A run whose
  // end is recorded has ended, whoever is lost behind it.
  void record_failure(const std::string& why) {
    console_.finish();
    if (is_over_) return;
    try {
      end(RunStatus::Failed, why);
    } catch (const UserError&) {
      if (recorder_) recorder_->log_message("This run's end could not be recorded.");
    }
  }

  TrainOptions options_;
  std::shared_ptr<Ranks> ranks_;
  TrainingInputs inputs_;
  const Config& config_ = inputs_.config;  // resolved
  Config share_;                           // this rank's part of it
  std::int64_t steps_;                     // the horizon
  bool is_over_ = false;                   // and recorded so
  double peak_ = 0;                        // FLOP/s of all ranks; 0: unknown
  std::optional<RunFolder> folder_;        // rank 0's alone
  Context context_;
  Transformer model_;
  AdamW optimizer_;
  LrSchedule schedule_;
  DataLoader loader_;
  std::optional<DataLoader> valid_;
  StepRunner stepper_;
  std::ostream silent_{nullptr};
  Console console_;
  std::optional<Recorder> recorder_;
  TrainingState state_;
  TrainResult result_;
  std::int64_t saved_step_ = 0;      // of this folder's newest checkpoint
  std::int64_t evaluated_step_ = 0;  // of the last evaluation
  StepPace unlogged_;                // since the last logged step
  Stopwatch watch_;                  // since the last report, where the next step was under way then
};

}  // namespace

Config check_training(const Config& config, const std::filesystem::path& run_dir,
                      const ResumeRequest& resume) {
  const TrainingInputs inputs = TrainingInputs::open(config);
  inputs.train_loader();
  inputs.valid_loader();
  if (!run_dir.empty()) check_beginning(run_dir, resume, inputs);
  return inputs.config;
}

TrainResult train(const Config& config, const TrainOptions& options, std::shared_ptr<Backend> backend,
                  std::ostream& console) {
  // First of all: a signal while the data is read ends the run as well as a later one.
  const StopSignals signals;
  Run run(config, options, std::move(backend), console);
  return run.run();
}

}  // namespace fathom
