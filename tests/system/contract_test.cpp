// The contract for scripts (docs/commands.md): flags, JSON keys, what goes to which stream, exit status.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/io/hdf5_file.h"
#include "tests/system/cli.h"
#include "train/run_folder.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using testing::Outcome;
using testing::read_bytes;

std::vector<std::string> keys(const nlohmann::json& object) {
  std::vector<std::string> all;
  for (const auto& [key, value] : object.items()) all.push_back(key);
  return all;
}

// The two runs that these tests read; each test is a process of its own, so each trains what it needs.
class Contract : public ::testing::Test {
 protected:
  nlohmann::json json(const std::string& arguments) const {
    const Outcome outcome = fathom_command(e, arguments);
    EXPECT_EQ(outcome.out.empty() ? 0 : std::count(outcome.out.begin(), outcome.out.end(), '\n'), 1)
        << arguments;
    return outcome.json();
  }

  Experiment e;
};

TEST_F(Contract, PlanItemisesWhatAConfigCosts) {
  const auto plan = json("plan mod.yaml --json");
  EXPECT_THAT(keys(plan), IsSupersetOf({"params_total", "params_active", "flops_per_token_forward",
                                        "flops_per_token_train", "tokens", "steps", "flops_total",
                                        "memory_bytes", "breakdown", "flops_6nd"}));
  EXPECT_THAT(keys(plan["breakdown"]),
              IsSupersetOf({"attention_proj", "attention_scores", "mlp", "router", "predictor", "head"}));
  double sum = 0;
  for (const auto& [term, flops] : plan["breakdown"].items()) sum += flops.get<double>();
  EXPECT_DOUBLE_EQ(sum, plan["flops_per_token_forward"].get<double>());
  EXPECT_EQ(plan["tokens"], 40 * 256);
  EXPECT_DOUBLE_EQ(plan["flops_total"].get<double>(),
                   plan["flops_per_token_train"].get<double>() * plan["tokens"].get<double>());
  // Two configs side by side.
  const auto scaling = json("plan mod.yaml --gpus 4 --flops-per-second 1e12 --json")["scaling"];
  ASSERT_EQ(scaling.size(), 3U);  // 1, 2 and 4
  EXPECT_EQ(scaling[2]["gpus"], 4);
  EXPECT_GT(scaling[2]["bytes_sent"], scaling[1]["bytes_sent"]);
  EXPECT_THAT(keys(json("plan dense.yaml mod.yaml --json")),
              IsSupersetOf({"other", "flops_per_token_ratio"}));
}

TEST_F(Contract, TrainPrintsOneObjectAndLeavesTheFilesOfARun) {
  const auto result = json("train mod.yaml --run-dir run --resume auto --device cpu --json");
  EXPECT_THAT(keys(result),
              IsSupersetOf({"run_dir", "status", "already_done", "resumed_at", "steps", "tokens", "flops",
                            "seconds", "loss", "best_val_loss", "checkpoint", "message"}));
  EXPECT_EQ(result["status"], "done");
  EXPECT_EQ(result["steps"], 40);
  for (const char* file :
       {"config.yaml", "metrics.jsonl", "train.log", "latest", "plan.json", "checkpoints"}) {
    EXPECT_TRUE(std::filesystem::exists(e / (std::string("run/") + file))) << file;
  }
  EXPECT_EQ(read_bytes(e / "run/latest"), "step_00000040.h5\n");
  // The plan is that of `fathom plan`, but for what depends on the store.
  auto plan = json("plan mod.yaml --json");
  plan.erase("passes");
  EXPECT_EQ(nlohmann::json::parse(read_bytes(e / "run/plan.json")), plan);
  int events = 0;
  for (const auto& entry : std::filesystem::directory_iterator(e / "run")) {
    events += entry.path().filename().string().starts_with("events.out.tfevents.") ? 1 : 0;
  }
  EXPECT_EQ(events, 1);
  const std::string log = read_bytes(e / "run/train.log");
  EXPECT_THAT(log, HasSubstr("evaluation at step 40"));
  EXPECT_THAT(log, ::testing::ContainsRegex("Data: .* tokens; this run makes [0-9.]+ passes over them"));
}

TEST_F(Contract, MetricsHaveTheKeysOfTheirKind) {
  e.trained("dense", "dense");
  e.trained("mod", "mod", "--peak-flops 1e11");
  for (const std::string run : {"dense", "mod"}) {
    const auto lines = e.lines(run);
    int steps = 0, evaluations = 0;
    for (const auto& line : lines) {
      if (line.contains("loss")) {
        ++steps;
        EXPECT_THAT(keys(line), IsSupersetOf({"step", "tokens", "flops", "loss", "lr", "grad_norm",
                                              "tokens_per_s", "seconds"}));
        EXPECT_TRUE(line.contains("mfu"));
        EXPECT_EQ(line.contains("routed_fraction"), run == "mod");
        if (run == "mod") {
          EXPECT_EQ(line["routed_fraction"], nlohmann::json({0.25, 0.25}));
          EXPECT_EQ(line["routed_layers"], nlohmann::json({1, 3}));
          EXPECT_THAT(keys(line), IsSupersetOf({"aux_loss", "predictor_loss", "predictor_accuracy"}));
        }
      } else if (!line.contains("event")) {
        ++evaluations;
        if (run == "dense") {
          EXPECT_THAT(keys(line), IsSupersetOf({"step", "val_loss"}));
          EXPECT_FALSE(line.contains("val_topk"));
        } else {
          EXPECT_THAT(keys(line),
                      IsSupersetOf({"step", "val_topk", "val_causal", "realised_capacity", "router_recall",
                                    "router_precision", "causal_flops_per_token"}));
          EXPECT_FALSE(line.contains("val_loss"));
        }
      }
    }
    EXPECT_EQ(steps, 40);
    EXPECT_EQ(evaluations, 7);  // at 6, 12, ... 36 and at the end
    EXPECT_EQ(lines.front().at("event"), "start");
    EXPECT_THAT(keys(lines.back()),
                IsSupersetOf({"event", "status", "steps", "seconds", "final_loss", "best_val_loss"}));
    EXPECT_EQ(lines.back().at("event"), "end");
    EXPECT_EQ(lines.back().at("status"), "done");
  }
}

TEST_F(Contract, EvalAgreesWithTheTrainingsOwnEvaluation) {
  e.trained("dense", "dense");
  e.trained("mod", "mod");
  // With the training's number of threads: how OpenBLAS splits a product may show in the last bit.
  const auto dense = json("eval dense --data train.valid.h5 --tokens 512 --batch 4 --threads 1 --json");
  EXPECT_THAT(keys(dense), IsSupersetOf({"loss", "bits_per_byte", "perplexity", "tokens", "bytes"}));
  EXPECT_FALSE(dense.contains("val_topk"));
  EXPECT_EQ(dense["tokens"], 512);
  EXPECT_EQ(dense["loss"], *e.metrics("dense").evals.back().val_loss);
  EXPECT_DOUBLE_EQ(dense["perplexity"].get<double>(), std::exp(dense["loss"].get<double>()));
  // A token of a byte store is a byte, but for the end of a document.
  EXPECT_NEAR(dense["bits_per_byte"].get<double>(), dense["loss"].get<double>() / std::log(2.0), 0.1);

  const auto mod = json("eval mod --data train.valid.h5 --tokens 512 --batch 4 --threads 1 --json");
  EXPECT_THAT(keys(mod), IsSupersetOf({"loss", "val_topk", "val_causal", "realised_capacity", "router_recall",
                                       "router_precision", "causal_flops_per_token"}));
  EXPECT_EQ(mod["val_topk"], *e.metrics("mod").evals.back().val_topk);
  EXPECT_EQ(mod["val_causal"], *e.metrics("mod").evals.back().val_causal);
  EXPECT_EQ(mod["loss"], mod["val_causal"]);
  // The threshold is a dial: near 0 everything goes through.
  const auto all = json("eval mod --data train.valid.h5 --threshold 0.001 --json --invariant");
  EXPECT_EQ(all["realised_capacity"], nlohmann::json({1.0, 1.0}));
  // For people.
  const Outcome text = fathom_command(e, "eval mod --data train.valid.h5");
  EXPECT_EQ(text.status, 0);
  EXPECT_THAT(text.out, HasSubstr("val_causal"));
  // A checkpoint file serves as well as its run.
  EXPECT_EQ(json("eval " + e.newest_checkpoint("mod") +
                 " --data train.valid.h5 --tokens 512 --batch 4 --threads 1 --json")["loss"],
            mod["loss"]);
}

// Staged experts that choose: two causal rules at once, of the routed blocks and of the experts.
TEST_F(Contract, ExpertsThatChooseAreServed) {
  e.trained("mode", "mode");
  const auto lines = e.lines("mode");
  for (const auto& line : lines) {
    if (line.contains("loss")) {
      EXPECT_THAT(keys(line), IsSupersetOf({"aux_loss", "predictor_loss", "predictor_accuracy",
                                            "expert_aux_loss", "expert_predictor_loss", "expert_accuracy"}));
    } else if (!line.contains("event")) {
      EXPECT_THAT(keys(line), IsSupersetOf({"val_topk", "val_causal", "realised_capacity", "expert_layers",
                                            "expert_capacity", "expert_recall", "expert_precision",
                                            "expert_recall_by_layer", "expert_precision_by_layer"}));
    }
  }
  const EvalRecord last = e.metrics("mode").evals.back();
  const auto eval = json("eval mode --data train.valid.h5 --tokens 512 --batch 4 --threads 1 --json");
  EXPECT_EQ(eval["loss"], *last.val_causal);
  EXPECT_EQ(eval["val_topk"], *last.val_topk);
  EXPECT_EQ(eval["expert_layers"], nlohmann::json({0, 1, 2, 3}));
  EXPECT_EQ(eval["expert_capacity"], last.expert_capacity);
  EXPECT_EQ(eval["expert_recall"], last.expert_recall_by_layer);
  EXPECT_EQ(eval["causal_flops_per_token"], *last.causal_flops_per_token);
  const auto all = json("eval mode --data train.valid.h5 --threshold 0.001 --json --invariant");
  EXPECT_EQ(all["expert_capacity"], nlohmann::json(std::vector(4, std::vector{1.0, 1.0})));
  EXPECT_EQ(all["expert_recall"], nlohmann::json({1.0, 1.0, 1.0, 1.0}));
  EXPECT_THAT(fathom_command(e, "eval mode --data train.valid.h5").out, HasSubstr("its experts took"));

  const auto text = json("generate mode --prompt-ids 72,101,108 -n 4 --temperature 0 --json");
  EXPECT_EQ(text["tokens"].size(), 4U);
  EXPECT_EQ(text["routed_fraction"].size(), 2U);
  ASSERT_EQ(text["expert_fraction"].size(), 4U);
  for (const auto& layer : text["expert_fraction"]) EXPECT_EQ(layer.size(), 2U);
  // None of it where nothing was taught.
  e.trained("mode", "blind", "--set routing.causal.method=none");
  expect_refusal(fathom_command(e, "generate blind --prompt-ids 72 -n 1"), 1,
                 {"routing.causal.method: none"});
  EXPECT_EQ(json("eval blind --data train.valid.h5 --json")["val_causal"], nullptr);
}

TEST_F(Contract, LogitsAreDumpedForComparisons) {
  e.trained("mod", "run");
  const auto dumped = json("eval run --dump-logits logits.h5 --prompt-ids 72,101,108 --json");
  EXPECT_EQ(dumped["dump_logits"], "logits.h5");
  EXPECT_EQ(dumped["positions"], 3);
  const H5Reader file(e / "logits.h5", "logits");
  EXPECT_THAT(file.dims("logits"), ElementsAre(3, 320));
  EXPECT_EQ(dumped["vocab_size"], 320);
  EXPECT_THAT(file.read<std::int32_t>("prompt_ids"), ElementsAre(72, 101, 108));
  // What greedy decoding takes is the last row's largest.
  const std::vector<float> logits = file.read<float>("logits");
  const auto last = logits.end() - 320;
  const auto next = json("generate run --prompt-ids 72,101,108 -n 1 --temperature 0 --json --logprobs");
  EXPECT_EQ(next["tokens"], nlohmann::json({std::max_element(last, last + 257) - last}));
  expect_refusal(fathom_command(e, "eval run --dump-logits logits.h5"), 2, {"--prompt-ids"});
  expect_refusal(fathom_command(e, "eval run --data train.h5 --prompt-ids 1"), 2, {"--dump-logits"});
}

TEST_F(Contract, GenerateFromTextIdsAndAFile) {
  e.trained("mod", "run");
  const auto first =
      json("generate run -p 'Mara lives' -n 12 --temperature 0.9 --top-p 0.95 --seed 7 --json --logprobs");
  EXPECT_THAT(keys(first),
              IsSupersetOf({"text", "tokens", "logprobs", "finish_reason", "prefill_tokens_per_s",
                            "decode_tokens_per_s", "routed_fraction", "routed_layers"}));
  EXPECT_TRUE(first["finish_reason"] == "length" || first["finish_reason"] == "stop");
  EXPECT_EQ(first["tokens"].size(), first["logprobs"].size());
  EXPECT_EQ(first["routed_fraction"].size(), 2u);
  // The seed decides, and bytes given as ids are the same prompt.
  const auto again = json(
      "generate run --prompt-ids 77,97,114,97,32,108,105,118,101,115 -n 12 --temperature 0.9 --top-p 0.95 "
      "--seed 7 "
      "--json");
  EXPECT_EQ(again["tokens"], first["tokens"]);
  EXPECT_FALSE(again.contains("logprobs"));

  testing::write_bytes(e / "prompts.jsonl", "{\"prompt\": \"Mara lives\"}\n\n{\"text\": \"The\"}\n");
  const Outcome many = fathom_command(
      e, "generate run --prompts prompts.jsonl -n 12 --temperature 0.9 --top-p 0.95 --seed 7 --json");
  ASSERT_EQ(many.status, 0) << many.err;
  std::istringstream lines(many.out);
  std::vector<nlohmann::json> objects;
  for (std::string line; std::getline(lines, line);) objects.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(objects.size(), 2u);
  EXPECT_EQ(objects[0]["tokens"], first["tokens"]);
  EXPECT_EQ(objects[1]["prompt"], "The");

  // For people: the prompt and what follows it.
  const Outcome text = fathom_command(e, "generate run -p 'Mara lives' -n 12 --seed 7");
  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(text.out.starts_with("Mara lives"));
}

// An almost untrained model gives the ids that only pad the vocabulary as much weight as any other.
TEST_F(Contract, GenerateNeverChoosesAnIdThatIsNoToken) {
  e.trained("dense", "run", "--set train.steps=1");
  for (int seed = 0; seed < 5; ++seed) {
    const Outcome outcome =
        fathom_command(e, "generate run -p a -n 64 --temperature 5 --json --seed " + std::to_string(seed));
    const auto json = outcome.json();
    for (const int id : json["tokens"]) EXPECT_LT(id, 257);
  }
}

TEST_F(Contract, PrintConfigShowsEveryKeyAndReadsBack) {
  const Outcome outcome = fathom_command(e, "train mod.yaml --print-config --set model.depth=6");
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  for (const char* line : {"depth: 6", "capacity: 0.25", "predictor_hidden: 8", "max_seq_len: 32",
                           "on_spike: stop", "target_flops: null", "document_mask: false"}) {
    EXPECT_THAT(outcome.out, HasSubstr(line));
  }
  testing::write_bytes(e / "again.yaml", outcome.out);
  EXPECT_EQ(fathom_command(e, "train again.yaml --print-config").out, outcome.out);
  EXPECT_EQ(json("train mod.yaml --print-config --set model.depth=6 --json")["config_yaml"], outcome.out);
  EXPECT_FALSE(std::filesystem::exists(e / "run"));
}

TEST_F(Contract, DryRunChecksEverythingAndTrainsNothing) {
  const Outcome outcome = fathom_command(e, Experiment::train("mod", "run", "--dry-run"));
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_THAT(outcome.out, HasSubstr("FLOPs a token"));
  EXPECT_FALSE(std::filesystem::exists(e / "run"));
  EXPECT_EQ(json("train mod.yaml --dry-run --json")["params_total"],
            json("plan mod.yaml --json")["params_total"]);
  const auto refused = [&](const std::string& set, std::initializer_list<std::string> words) {
    expect_refusal(fathom_command(e, Experiment::train("mod", "run", "--dry-run " + set)), 1, words);
  };
  refused("--set data.valid=absent.h5", {"absent.h5"});
  refused("--set data.tokenizer=absent.model", {"absent.model"});
  refused(
      "--set train.seq_len=65536 --set train.batch_tokens=65536 --set train.micro_batch=0 "
      "--set train.eval_tokens=65536",
      {"fewer than one sequence", "65537"});
}

// What a training would refuse, a dry run refuses, and it changes nothing.
TEST_F(Contract, DryRunRefusesWhatTheTrainingWould) {
  e.trained("mod", "run");
  e.trained("dense", "dense");
  testing::write_bytes(e / "file", "mine");
  const auto listing = [&] {
    std::vector<std::string> all;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(e / "run"))
      if (entry.path().filename() != ".lock")
        all.push_back(entry.path().string() + testing::read_bytes(entry.path().string()));
    std::sort(all.begin(), all.end());
    return all;
  };
  const auto before = listing();
  const auto refused = [&](const std::string& run, const std::string& more, int status,
                           std::initializer_list<std::string> words) {
    SCOPED_TRACE(run + " " + more);
    expect_refusal(fathom_command(e, Experiment::train("mod", run, more)), status, words);
    expect_refusal(fathom_command(e, Experiment::train("mod", run, "--dry-run " + more)), status, words);
  };
  refused("run", "--set train.lr=1e-2", 1, {"run of another config", "train.lr"});
  refused("run", "--resume never", 1, {"already holds a run"});
  refused("run", "--set data.train=train.valid.h5", 1, {"other text"});
  refused("file", "", 1, {"run folder file is a file"});
  refused("new", "--resume absent", 1, {"absent does not exist"});
  refused("new", "--resume run", 1, {"is at step 40", "longer horizon"});
  refused("new", "--resume run --set train.steps=50 --set routing.capacity=0.5", 1, {"another model"});
  refused("new", "--device cuda", 1, {"GPU"});
  refused("new", "--set train.precision=bf16", 2, {"train.precision"});
  EXPECT_EQ(fathom_command(e, Experiment::train("mod", "run", "--dry-run")).status, 0);
  EXPECT_EQ(fathom_command(e, Experiment::train("mod", "else", "--dry-run --resume run --set train.steps=50"))
                .status,
            0);
  EXPECT_FALSE(std::filesystem::exists(e / "else"));
  EXPECT_EQ(listing(), before);
  for (const CheckpointFile& file : list_checkpoints(e / "run"))
    testing::write_bytes(file.path.string(), testing::read_bytes(file.path.string()).substr(0, 3000));
  refused("run", "", 1, {"No checkpoint of run can be used", "truncated"});
}

TEST_F(Contract, ReportPrintsItsRowsAndWritesOnePage) {
  e.trained("dense", "runs/dense");
  e.trained("mod", "runs/mod");
  testing::write_bytes(e / "runs/mod/samples.txt", "Mara lives in a sample");
  const auto report = json("report runs/dense runs/mod -o page.html --json");
  ASSERT_EQ(report["runs"].size(), 2u);
  EXPECT_THAT(keys(report["runs"][1]),
              IsSupersetOf({"name", "status", "val_topk", "val_causal", "gap", "realised_capacity",
                            "tokens_per_s", "params_total", "flops_per_token_train", "seconds"}));
  EXPECT_EQ(report["runs"][0]["name"], "dense");
  const std::string page = read_bytes(e / "page.html");
  EXPECT_THAT(page, HasSubstr("Mara lives in a sample"));
  EXPECT_THAT(page, HasSubstr("attention_scores"));  // of plan.json
  EXPECT_TRUE(std::filesystem::exists(e / "page.csv"));
}

TEST_F(Contract, BenchPrintsALineOfJson) {
  const auto bench = json(
      "bench train --preset d2 --batch 1 --seq 32 --vocab 64 --steps 2 --variant mod --invariant "
      "--json --threads 1");
  EXPECT_THAT(keys(bench), IsSupersetOf({"bench", "preset", "variant", "ms", "tok_s", "gflops",
                                         "share_of_ceiling", "peak_memory_gb", "flops_per_step"}));
}

// What it counts is the time that counts, however often it warmed up.
TEST_F(Contract, BenchBatchCountsOneTimeOfItsRequests) {
  e.trained("mod", "run", "--set train.steps=1");
  const std::string any =
      "bench batch run --data train.valid.h5 --requests 3 --prompt-min 5 --new-min 2 --new-max 4 --json "
      "--threads 1";
  const std::string of = any + " --prompt-max 9";
  const auto cold = json(of + " --warm-up 0"), warm = json(of), warmer = json(of + " --warm-up 3");
  EXPECT_THAT(keys(warm),
              IsSupersetOf({"bench", "device", "requests", "sequences", "warm_up", "prompt_tokens",
                            "new_tokens", "seconds", "new_tok_s", "request_s", "cpu_seconds", "request",
                            "steps", "preemptions", "routed_fraction"}));
  EXPECT_EQ(warm["warm_up"], 1);
  EXPECT_GE(warm["prompt_tokens"], 15);
  EXPECT_GE(warm["new_tokens"], 6);
  for (const char* same : {"prompt_tokens", "new_tokens", "steps", "preemptions", "routed_fraction"}) {
    EXPECT_EQ(warm[same], cold[same]) << same;
    EXPECT_EQ(warmer[same], cold[same]) << same;
  }
  EXPECT_EQ(json(of + " --sequences 1")["request"]["count"], 3);
  // Texts that the context cuts short are not what was asked for.
  expect_refusal(fathom_command(e, any + " --prompt-max 30"), 2, {"--prompt-max 30", "context of 32"});
}

TEST_F(Contract, KernelBenchesPrintLinesOfJson) {
  for (const auto& [bench, lines] : {std::pair<std::string, int>{"copy --bytes 100000", 1},
                                     {"gemm --shape 64x32x48", 5},
                                     {"gemm --shape 64x32x48 --codes", 7},
                                     {"attention --seq 32 --heads 2 --head-dim 16", 2},
                                     {"ops --rows 64 --width 32 --only norm", 7}}) {
    SCOPED_TRACE(bench);
    const Outcome outcome = fathom_command(e, "bench " + bench + " --json --device cpu --threads 1");
    ASSERT_EQ(outcome.status, 0) << outcome.err;
    std::istringstream out(outcome.out);
    int found = 0;
    for (std::string line; std::getline(out, line); ++found) {
      const auto parsed = nlohmann::json::parse(line);
      EXPECT_THAT(keys(parsed),
                  IsSupersetOf({"bench", "device", "dtype", "what", "ms", "ceiling", "share_of_ceiling"}));
      EXPECT_GT(parsed.at("ms"), 0);
      EXPECT_EQ(parsed.at("dtype"), "fp32");
    }
    EXPECT_EQ(found, lines);
  }
}

TEST_F(Contract, DoctorPrintsOneObject) {
  const auto doctor = json("doctor --json");
  EXPECT_THAT(keys(doctor),
              IsSupersetOf({"version", "cuda_build", "gpus", "gpu_why_not", "cuda_libraries", "hints"}));
}

TEST_F(Contract, WrongUsageIsStatusTwoAndFailureStatusOne) {
  const auto refused = [&](const std::string& arguments, int status,
                           std::initializer_list<std::string> words) {
    SCOPED_TRACE(arguments);
    expect_refusal(fathom_command(e, arguments), status, words);
  };
  refused("", 2, {"subcommand"});
  refused("fly", 2, {"'fly' is not a command"});
  refused("trian mod.yaml", 2, {"Did you mean train?"});
  refused("train", 2, {"config"});
  refused("train mod.yaml", 2, {"--run-dir"});
  refused("train mod.yaml --run-dir run --wings", 2, {"--wings"});
  refused("train absent.yaml --run-dir run", 2, {"absent.yaml", "No such file"});
  refused("train mod.yaml --run-dir run --device gpu", 2, {"--device gpu", "cpu"});
  refused("train mod.yaml --run-dir run --device cuda:0", 1, {"cuda:0", "--device cpu"});
  refused("train mod.yaml --run-dir run --set train.precision=bf16", 2, {"train.precision", "fp32"});
  refused("eval absent --data train.h5", 1, {"absent", "does not exist"});
  refused("eval absent --data train.h5 --threshold -0.5", 2, {"--threshold"});
  refused("eval absent --data train.h5 --threshold 1", 2, {"--threshold"});
  refused("generate absent -p x", 1, {"absent"});
  refused("generate absent", 2, {"-p TEXT", "--prompt-ids", "--prompts"});
  refused("generate absent -p x -n many", 2, {"'many' is not a number"});
  refused("generate absent -p x --prompt-ids 1", 2, {"exactly one"});
  refused("generate absent -p x -n 0", 2, {"--tokens", "'0' is not a number from 1 to"});
  refused("generate absent -p x --top-p 2", 2, {"--top-p"});
  refused("report absent -o page.html", 1, {"absent", "does not exist"});
  refused("bench train --preset d99", 2, {"d99", "d2"});
  refused("bench gemm --shape 1x2", 2, {"--shape", "1x2", "ROWSxINxOUT"});
  refused("bench copy --precision bf16 --device cpu", 2, {"--precision", "bf16", "--device cuda"});
  refused("bench attention --heads 3 --kv-heads 2", 2, {"--kv-heads 2", "--heads 3", "divide"});
  refused("bench attention --kv-heads 24", 2, {"--kv-heads 24", "--heads 12", "divide"});
  refused("bench ops --only nothing --threads 1", 2, {"--only nothing", "adamw", "rms_norm_forward"});
  refused("doctor --threads -1", 2, {"--threads", "'-1' is not a number from 0 to 1024"});
  refused("doctor --threads 20000", 2, {"--threads", "'20000' is not a number from 0 to 1024"});
  refused("doctor --threads 100000", 2, {"--threads", "0 to 1024"});
  refused("data inspect train.h5 --show -3", 2, {"--show", "'-3' is not a number from 0 to"});
  refused("plan", 2, {"CONFIG"});
  refused("plan mod.yaml --gpus 2", 2, {"how fast one GPU is", "--flops-per-second"});
  refused("plan mod.yaml --gpus 2 --flops-per-second 1e12 --interconnect token-ring", 2,
          {"'token-ring' is no link"});
  const Outcome help = fathom_command(e, "train --help");
  EXPECT_EQ(help.status, 0);
  EXPECT_THAT(help.out, HasSubstr("--run-dir"));
  EXPECT_EQ(fathom_command(e, "--version").out.rfind("fathom ", 0), 0u);
}

}  // namespace
}  // namespace fathom
