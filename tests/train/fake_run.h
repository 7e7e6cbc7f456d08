// Run folders with made-up but realistic metrics, for the report's tests and for looking at its pages.
#pragma once

#include <cmath>
#include <filesystem>
#include <random>
#include <string>

#include "tests/train/test_folder.h"
#include "train/metrics/metrics_log.h"

namespace fathom::testing_support {

struct FakeRun {
  std::int64_t steps = 1200;
  std::int64_t log_every = 2;
  std::int64_t eval_every = 100;
  double final_loss = 3.4;
  double flops_per_token = 6.1e6;
  double tokens_per_s = 15000;
  bool routed = false;
  bool experts = false;    // in layers 0 to 2, of which the first has a busy one
  double nan_share = 0.0;  // of the logged losses
  bool resumed = false;
  bool ended = true;
  unsigned seed = 1;
  std::string tokenizer_hash = "bytes";
  std::string valid_source_hash = "5eed";
};

inline RunFacts fake_facts(const FakeRun& f) {
  RunFacts facts;
  facts.params_total = f.routed ? 5'400'000 : 3'300'000;
  facts.params_active = f.routed ? 3'700'000 : 3'300'000;
  facts.flops_per_token_forward = f.flops_per_token / 3;
  facts.flops_per_token_train = f.flops_per_token;
  facts.total_steps = f.steps;
  facts.batch_tokens = 4096;
  facts.seq_len = 256;
  facts.depth = f.routed ? 8 : 6;
  if (f.routed) {
    facts.routed_layers = {1, 3, 5, 7};
    facts.capacity = 0.125;
  }
  facts.train_store_tokens = 9'000'000;
  facts.tokenizer_hash = f.tokenizer_hash;
  facts.valid_source_hash = f.valid_source_hash;
  facts.seed = f.seed;
  facts.device = "cpu, 2 threads";
  facts.git_sha = "0123abc";
  return facts;
}

inline void write_fake_run(const std::filesystem::path& folder, const FakeRun& f) {
  std::filesystem::create_directories(folder / "checkpoints");
  std::mt19937 random(f.seed);
  std::normal_distribution<double> noise;
  std::uniform_real_distribution<double> uniform;
  const std::int64_t batch = 4096;
  const auto loss_at = [&](double t) {
    return f.final_loss + (8.4 - f.final_loss) * std::exp(-22 * t) +
           1.1 * (std::exp(-3.2 * t) - std::exp(-3.2));
  };
  MetricsLog log(folder / "metrics.jsonl");
  EventRecord start;
  start.facts = fake_facts(f);
  log.append(start);
  for (std::int64_t step = 1; step <= f.steps; ++step) {
    const double t = static_cast<double>(step) / static_cast<double>(f.steps);
    const double tokens = static_cast<double>(step * batch);
    const double seconds = tokens / f.tokens_per_s;
    if (f.resumed && step == f.steps / 2) {
      EventRecord resume;
      resume.kind = EventKind::Resume;
      resume.step = step;
      resume.seconds = seconds;
      resume.checkpoint = "step_00000600.h5";
      resume.facts = start.facts;
      log.append(resume);
    }
    if (step % f.log_every == 0) {
      StepRecord r;
      r.step = step;
      r.tokens = step * batch;
      r.flops = tokens * f.flops_per_token;
      r.loss = loss_at(t) + 0.07 * noise(random);
      if (uniform(random) < f.nan_share) r.loss = std::nan("");
      r.loss_average = loss_at(t);
      r.lr = 1e-3 * (t < 0.05 ? t / 0.05 : 0.1 + 0.45 * (1 + std::cos(3.14159 * (t - 0.05) / 0.95)));
      r.grad_norm = (0.5 + 4 * std::exp(-30 * t)) * std::exp(0.15 * noise(random));
      r.tokens_per_s = f.tokens_per_s * (1 + 0.03 * noise(random));
      r.flops_per_s = r.tokens_per_s * f.flops_per_token;
      r.mfu = r.flops_per_s / 1.5e11;
      r.seconds = seconds;
      r.memory_bytes = 4.1e8;
      if (f.routed) {
        r.aux_loss = 0.3 + 0.3 * std::exp(-8 * t);
        r.predictor_accuracy = 0.97 - 0.12 * std::exp(-6 * t);
        r.routed_layers = {1, 3, 5, 7};
        r.routed_fraction = {0.125, 0.125, 0.125, 0.125};
        for (int layer = 0; layer < 4; ++layer)
          r.router.push_back({-1.9, -4.2 - layer, 3.1, 0.12 + 0.05 * std::exp(-5 * t)});
      }
      if (f.experts) {
        r.expert_layers = {0, 1, 2};
        for (int layer = 0; layer < 3; ++layer)
          r.experts.push_back({.uncovered = 0.0925 + 0.01 * layer,
                               .per_token = 1.0,
                               .dropped = 0.03125,
                               .load_max = layer == 0 ? 2.125 : 1.5,
                               .load_min = 0.25,
                               .noop_affinity = 0.375,
                               .noop_share = 0.4375,
                               .entropy = 1.8125});
      }
      log.append(r);
    }
    if (step % f.eval_every == 0 || step == f.steps) {
      EvalRecord e;
      e.step = step;
      e.tokens = step * batch;
      e.flops = tokens * f.flops_per_token;
      e.seconds = seconds;
      const double loss = loss_at(t) + 0.03;
      if (f.routed) {
        e.val_topk = loss;
        e.val_causal = loss + 0.004 + 0.05 * std::exp(-6 * t);
        e.routed_layers = {1, 3, 5, 7};
        for (int layer = 0; layer < 4; ++layer)
          e.realised_capacity.push_back(0.125 + 0.008 * noise(random) + 0.04 * std::exp(-5 * t));
        e.router_recall = 0.93 - 0.4 * std::exp(-5 * t);
        e.router_precision = 0.90 - 0.3 * std::exp(-5 * t);
        e.router_recall_by_layer = {0.95, 0.93, 0.92, 0.91};
        e.router_precision_by_layer = {0.91, 0.90, 0.90, 0.89};
        e.causal_flops_per_token = f.flops_per_token / 3 * 1.01;
      } else {
        e.val_loss = loss;
      }
      if (f.experts) {
        e.expert_layers = {0, 1, 2};
        e.expert_capacity = {{0.0625, 0.53125, 0.25}, {0.25, 0.25, 0.25}, {0.3, 0.2, 0.25}};
        e.expert_recall = 0.9 - 0.4 * std::exp(-5 * t);
        e.expert_precision = 0.88 - 0.3 * std::exp(-5 * t);
        e.expert_recall_by_layer = {0.8125, 0.93, 0.92};
        e.expert_precision_by_layer = {0.91, 0.90, 0.90};
      }
      log.append(e);
    }
  }
  if (f.ended) {
    EventRecord end;
    end.kind = EventKind::End;
    end.status = RunStatus::Done;
    end.step = f.steps;
    end.seconds = static_cast<double>(f.steps * batch) / f.tokens_per_s;
    log.append(end);
  }
  write_file(folder / "config.yaml", std::string("seed: 1\nmodel:\n  width: 192\n  depth: ") +
                                         (f.routed ? "8" : "6") +
                                         "\nrouting:\n  kind: " + (f.routed ? "mod" : "none") + "\n");
  write_file(
      folder / "plan.json",
      f.routed
          ? R"({"params_total": 5400000, "breakdown": {"attention_proj": 420000, "attention_scores": 60000, "mlp": 830000, "router": 1500, "predictor": 24000, "head": 780000}})"
          : R"({"params_total": 3300000, "breakdown": {"attention_proj": 380000, "attention_scores": 90000, "mlp": 760000, "head": 780000}})");
  write_file(
      folder / "samples.json",
      R"([{"prompt": "The sea", "text": " is a body of salt water, <covering> the greater part of the earth; & hence, the ocean in general."},
                 {"prompt": "To learn", "text": " is to gain knowledge or information of; to ascertain by inquiry, study, or investigation."}])");
}

}  // namespace fathom::testing_support
