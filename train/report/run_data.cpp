#include "train/report/run_data.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <map>
#include <set>

#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "train/run_folder.h"

namespace fathom::report {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::string read_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

template <typename F>
std::optional<double> median_of(const std::vector<StepRecord>& steps, F&& value) {
  std::vector<double> values;
  for (const StepRecord& r : steps) {
    if (const std::optional<double> v = value(r); v && std::isfinite(*v) && *v > 0.0) values.push_back(*v);
  }
  if (values.empty()) return {};
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::optional<double> late_loss(const std::vector<StepRecord>& steps) {
  double sum = 0.0;
  std::int64_t count = 0;
  for (std::size_t i = steps.size() - steps.size() / 20 - (steps.empty() ? 0 : 1); i < steps.size(); ++i) {
    if (!std::isfinite(steps[i].loss)) continue;
    sum += steps[i].loss;
    ++count;
  }
  if (count == 0) return {};
  return sum / static_cast<double>(count);
}

void add_facts(RunSummary& s, const RunFacts& f) {
  const auto known = [](auto value) { return value > 0 ? std::optional(value) : std::nullopt; };
  s.total_steps = known(f.total_steps);
  s.params_total = known(f.params_total);
  s.params_active = known(f.params_active);
  s.depth = known(f.depth);
  s.flops_per_token_train = known(f.flops_per_token_train);
  s.flops_per_token_forward = known(f.flops_per_token_forward);
  s.capacity = f.capacity;
  s.routed_layers = f.routed_layers;
  s.tokenizer_hash = f.tokenizer_hash;
  s.valid_source_hash = f.valid_source_hash;
  s.device = f.device;
  s.git_sha = f.git_sha;
  s.seed = f.seed;
  if (f.train_store_tokens > 0 && s.tokens) {
    s.passes = static_cast<double>(*s.tokens) / static_cast<double>(f.train_store_tokens);
  }
}

void add_progress(RunSummary& s, const Metrics& m) {
  if (!m.steps.empty()) {
    const StepRecord& last = m.steps.back();
    s.steps = last.step;
    s.tokens = last.tokens;
    s.flops_total = last.flops;
    s.seconds = last.seconds;
    s.routed_layers = last.routed_layers;
  }
  s.train_loss = late_loss(m.steps);
  s.tokens_per_s = median_of(m.steps, [](const StepRecord& r) { return std::optional(r.tokens_per_s); });
  s.flops_per_s = median_of(m.steps, [](const StepRecord& r) { return std::optional(r.flops_per_s); });
  s.mfu = median_of(m.steps, [](const StepRecord& r) { return r.mfu; });
  for (const StepRecord& r : m.steps) {
    if (r.memory_bytes) s.memory_bytes = std::max(s.memory_bytes.value_or(0.0), *r.memory_bytes);
  }
}

void add_events(RunSummary& s, const std::vector<EventRecord>& events) {
  s.status = "unfinished";
  for (const EventRecord& e : events) {
    switch (e.kind) {
      case EventKind::Resume:
        ++s.resumes;
        [[fallthrough]];
      case EventKind::Start:
        s.status = "unfinished";
        if (e.facts) add_facts(s, *e.facts);
        break;
      case EventKind::Spike:
        ++s.spikes;
        break;
      case EventKind::Nan:
        ++s.nans;
        break;
      case EventKind::End:
        if (e.status) s.status = name_of(*e.status);
        s.steps = e.step;
        if (e.tokens) s.tokens = e.tokens;
        if (e.flops) s.flops_total = e.flops;
        s.seconds = e.seconds;
        break;
      case EventKind::Checkpoint:
      case EventKind::Stop:
        break;
    }
  }
}

void add_evaluations(RunSummary& s, const std::vector<EvalRecord>& evals) {
  for (const EvalRecord& e : evals) {
    const double loss = e.judged_loss();
    if (std::isfinite(loss) && (!s.best_val || loss < *s.best_val)) {
      s.best_val = loss;
      s.best_step = e.step;
    }
  }
  if (evals.empty()) return;
  const EvalRecord& last = evals.back();
  s.val_served = last.val_loss ? last.val_loss : last.val_causal;  // top-k alone cannot be served
  s.bits_per_byte = last.bits_per_byte;
  s.val_topk = last.val_topk;
  s.val_causal = last.val_causal;
  if (last.val_topk && last.val_causal) s.gap = *last.val_causal - *last.val_topk;
  if (!last.routed_layers.empty()) s.routed_layers = last.routed_layers;
  s.realised_capacity = last.realised_capacity;
  s.router_recall = last.router_recall;
  s.router_precision = last.router_precision;
  s.causal_flops_per_token = last.causal_flops_per_token;
}

// plan.json fills in what the run did not record itself; one that cannot be read is an error, not a blank.
void add_plan(RunData& run) {
  const fs::path path = run.path / "plan.json";
  std::error_code error;
  if (!fs::exists(path, error)) return;
  const Json plan = Json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
  if (!plan.is_object()) {
    throw UserError(path.string() + " is not a JSON object.",
                    "Write it with: fathom plan CONFIG --json > " + path.string());
  }
  const auto fill = [&](const char* key, auto& out) {
    using Value = typename std::remove_reference_t<decltype(out)>::value_type;
    if (const auto it = plan.find(key); !out && it != plan.end() && it->is_number())
      out = it->template get<Value>();
  };
  fill("params_total", run.summary.params_total);
  fill("params_active", run.summary.params_active);
  fill("flops_per_token_forward", run.summary.flops_per_token_forward);
  fill("flops_per_token_train", run.summary.flops_per_token_train);
  fill("steps", run.summary.total_steps);
  const auto it = plan.find("breakdown");
  if (it == plan.end() || !it->is_object()) return;
  for (const auto& [term, value] : it->items()) {
    if (value.is_number() && value.get<double>() > 0.0) run.breakdown.emplace_back(term, value.get<double>());
  }
}

// samples.json: a list of {"prompt", "text"} or of strings. samples.txt: shown as it is.
std::vector<Sample> load_samples(const fs::path& run) {
  std::vector<Sample> out;
  const Json json = Json::parse(read_text(run / "samples.json"), nullptr, /*allow_exceptions=*/false);
  if (json.is_array()) {
    for (const Json& sample : json) {
      if (sample.is_string()) out.push_back({"", sample.get<std::string>()});
      if (!sample.is_object()) continue;
      const auto text = [&](const char* key) {
        const auto it = sample.find(key);
        return it != sample.end() && it->is_string() ? it->get<std::string>() : std::string();
      };
      out.push_back({text("prompt"), text("text")});
    }
  }
  if (std::string text = read_text(run / "samples.txt"); !text.empty()) out.push_back({"", std::move(text)});
  return out;
}

// Whether two runs recorded different values.
bool differ(std::span<const RunData> runs, std::string RunSummary::*field) {
  std::set<std::string> values;
  for (const RunData& run : runs) {
    if (!(run.summary.*field).empty()) values.insert(run.summary.*field);
  }
  return values.size() > 1;
}

fs::path clean(const fs::path& path) {
  const fs::path absolute = fs::absolute(path).lexically_normal();
  return absolute.has_filename() ? absolute : absolute.parent_path();
}

// Folder names; where two runs share one, their parents' names are put in front until they differ.
std::vector<std::string> names_of(std::span<const fs::path> paths) {
  std::vector<std::string> names;
  std::vector<fs::path> parents;
  for (const fs::path& path : paths) {
    names.push_back(clean(path).filename().string());
    parents.push_back(clean(path).parent_path());
  }
  for (bool changed = true; changed;) {
    changed = false;
    std::map<std::string, int> count;
    for (const std::string& name : names) ++count[name];
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (count[names[i]] < 2 || !parents[i].has_filename()) continue;
      names[i] = (parents[i].filename() / names[i]).string();
      parents[i] = parents[i].parent_path();
      changed = true;
    }
  }
  return names;
}

RunData load_run(const fs::path& path, const std::string& name) {
  std::error_code error;
  if (!fs::exists(path, error)) throw UserError("the run " + path.string() + " does not exist.");
  if (!is_run_folder(path) || !fs::exists(path / "metrics.jsonl", error)) {
    throw UserError(path.string() + " is no run folder: it has no metrics.jsonl.",
                    "Give the folders that fathom train --run-dir wrote.");
  }
  RunData run;
  run.path = path;
  run.name = name;
  run.metrics = read_metrics(path / "metrics.jsonl");
  run.config = read_text(path / "config.yaml");
  run.samples = load_samples(path);
  run.summary.name = name;
  add_progress(run.summary, run.metrics);
  add_events(run.summary, run.metrics.events);
  add_evaluations(run.summary, run.metrics.evals);
  add_plan(run);
  return run;
}

}  // namespace

std::vector<RunData> load_runs(std::span<const fs::path> paths) {
  const std::vector<std::string> names = names_of(paths);
  std::vector<RunData> out;
  for (std::size_t i = 0; i < paths.size(); ++i) out.push_back(load_run(paths[i], names[i]));
  return out;
}

std::string why_incomparable(std::span<const RunData> runs) {
  std::string why;
  if (differ(runs, &RunSummary::tokenizer_hash)) {
    why =
        "The runs have different tokenizers, so their losses, which are in nats a token, do not compare. "
        "Bits per "
        "byte do, on equal text.";
  }
  if (differ(runs, &RunSummary::valid_source_hash)) {
    why += why.empty() ? "" : " ";
    why += "The runs were validated on different texts, so their validation losses do not compare.";
  }
  return why;
}

std::vector<double> smooth(const std::vector<double>& y, std::size_t window) {
  const std::size_t before = window / 2;
  std::vector<double> out(y.size(), std::nan(""));
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (!std::isfinite(y[i])) continue;
    // At the start, where losses fall steeply, the window shrinks on both sides alike; at the end only ahead.
    const std::size_t back = std::min(before, i);
    const std::size_t last = std::min(i + back, y.size() - 1);
    double sum = 0.0;
    std::size_t count = 0;
    for (std::size_t j = i - back; j <= last; ++j) {
      if (!std::isfinite(y[j])) continue;
      sum += y[j];
      ++count;
    }
    out[i] = sum / static_cast<double>(count);
  }
  return out;
}

}  // namespace fathom::report
