// fathom routes: every output has the same routes, and they are those that the model's config says.
#include <algorithm>
#include <filesystem>
#include <map>
#include <sstream>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Outcome;
using testing::read_bytes;
using testing::write_bytes;

using Cells = std::vector<std::string>;

// The records of a CSV (RFC 4180), by the names of its columns.
std::vector<std::map<std::string, std::string>> rows_of(const std::string& csv) {
  std::vector<Cells> records;
  Cells cells(1);
  bool quoted = false;
  for (std::size_t i = 0; i < csv.size(); ++i) {
    if (csv[i] == '"' && quoted && i + 1 < csv.size() && csv[i + 1] == '"') {
      cells.back().push_back(csv[++i]);
    } else if (csv[i] == '"') {
      quoted = !quoted;
    } else if (csv[i] == ',' && !quoted) {
      cells.emplace_back();
    } else if (csv[i] == '\n' && !quoted) {
      records.push_back(std::exchange(cells, Cells(1)));
    } else if (csv[i] != '\r' || quoted) {
      cells.back().push_back(csv[i]);
    }
  }
  EXPECT_FALSE(quoted);
  std::vector<std::map<std::string, std::string>> rows;
  for (std::size_t r = 1; r < records.size(); ++r) {
    EXPECT_EQ(records[r].size(), records[0].size()) << "record " << r;
    auto& row = rows.emplace_back();
    for (std::size_t i = 0; i < std::min(records[0].size(), records[r].size()); ++i)
      row[records[0][i]] = records[r][i];
  }
  return rows;
}

class RoutesCommand : public ::testing::Test {
 protected:
  nlohmann::json json(const std::string& arguments) const {
    return fathom_command(e, "routes " + arguments + " --json --threads 1").json();
  }
  void refused(const std::string& arguments, int status, std::initializer_list<std::string> words) const {
    SCOPED_TRACE(arguments);
    expect_refusal(fathom_command(e, "routes " + arguments), status, words);
  }

  Experiment e;
};

// mod.yaml: K = 8 of 32 tokens at layers 1 and 3.
TEST_F(RoutesCommand, EverySequenceHasItsKInEveryOutput) {
  e.trained("mod", "run");
  const auto j = json("run --tokens 80 -o page.html --csv routes.csv");  // two sequences and a half
  EXPECT_EQ(j.at("tokens"), 80);
  EXPECT_EQ(j.at("sequences"), 3);
  EXPECT_EQ(j.at("rule"), "topk");
  ASSERT_EQ(j.at("routers").size(), 2u);
  std::map<std::pair<std::string, std::string>, int> kept;  // by sequence and layer
  int sum = 0;
  const auto rows = rows_of(read_bytes(e / "routes.csv"));
  ASSERT_EQ(rows.size(), 160u);
  for (const auto& row : rows) {
    if (row.at("kept") == "1") ++kept[{row.at("sequence"), row.at("layer")}];
    EXPECT_FALSE(row.at("score").empty());
    EXPECT_FALSE(row.at("predicted").empty());
    EXPECT_EQ(row.at("experts"), "");
  }
  for (const char* layer : {"1", "3"}) {
    EXPECT_EQ((kept[{"0", layer}]), 8);
    EXPECT_EQ((kept[{"1", layer}]), 8);
    EXPECT_EQ((kept[{"2", layer}]), 4);
  }
  for (const auto& router : j.at("routers")) {
    EXPECT_EQ(router.at("kept"), 20);
    EXPECT_EQ(router.at("kept_tokens").size(), 20u);
    EXPECT_DOUBLE_EQ(router.at("share").get<double>(), 0.25);
  }
  for (const int depth : j.at("depths")) sum += depth;
  EXPECT_EQ(sum, 40);
  const std::string page = read_bytes(e / "page.html");
  EXPECT_THAT(
      page, AllOf(HasSubstr("<title>layer 1: 8 of 32</title>"), HasSubstr("<title>layer 3: 4 of 16</title>"),
                  HasSubstr("Layer 3: router weights r"), HasSubstr("Layer 1: the predictor&#39;s logits")));
  // All of them again over files of their own kind.
  EXPECT_EQ(json("run --tokens 80 -o page.html --csv routes.csv"), j);
}

TEST_F(RoutesCommand, TheCausalRuleIsTheOneThatGenerates) {
  e.trained("mod", "run");
  const auto routes = json("run -p 'Mara lives in' --rule causal --threshold 0.4");
  const auto text = fathom_command(e, "generate run -p 'Mara lives in' -n 1 --threshold 0.4 --json").json();
  EXPECT_EQ(routes.at("tokens"), text.at("prompt_tokens"));
  for (std::size_t i = 0; i < 2; ++i)
    EXPECT_EQ(routes.at("routers").at(i).at("share"), text.at("routed_fraction").at(i));
  EXPECT_EQ(routes.at("rule"), "causal");
}

TEST_F(RoutesCommand, TextComesFromThePromptAFileOrAStore) {
  e.trained("mod", "run");
  write_bytes(e / "text.txt", "Mara lives in a town.");
  const auto prompt = json("run -p 'Mara lives in a town.'");
  EXPECT_EQ(json("run --file text.txt"), prompt);
  EXPECT_EQ(prompt.at("tokens"), 21);
  EXPECT_EQ(json("run --file text.txt --tokens 4").at("tokens"), 4);
  EXPECT_EQ(json("run --file text.txt --tokens 4").at("tokens_available"), 21);
  EXPECT_EQ(json("run -p 'Mara lives in a town.' --skip 5").at("ids"),
            json("run -p 'lives in a town.'").at("ids"));
  const auto whole = json("run --tokens 64").at("ids");
  const auto second = json("run --tokens 32 --skip 32");
  EXPECT_EQ(second.at("first"), 32);
  EXPECT_TRUE(std::equal(whole.begin() + 32, whole.end(), second.at("ids").begin()));
  EXPECT_EQ(json("run"), json("run --data train.valid.h5"));
  EXPECT_EQ(json("run").at("tokens"), 32) << "one sequence of training";
  // The prompt is longer than a sequence: each part of it is routed as one.
  EXPECT_EQ(json("run -p '0123456789012345678901234567890123456789'").at("sequences"), 2);
}

TEST_F(RoutesCommand, WithoutATerminalThereAreNoColours) {
  e.trained("mod", "run");
  const Outcome plain = fathom_command(e, "routes run -p 'Mara lives'");
  EXPECT_THAT(plain.out, AllOf(HasSubstr("  Mara lives\n"), HasSubstr("Below each token"),
                               HasSubstr("2 of 10"), Not(HasSubstr("\x1b"))));
  EXPECT_THAT(fathom_command(e, "routes run -p 'Mara lives' --color always", "COLORTERM=truecolor").out,
              HasSubstr("\x1b[48;2;"));
  EXPECT_THAT(fathom_command(e, "routes run -p 'Mara lives' --color always", "COLORTERM=").out,
              HasSubstr("\x1b[48;5;"));
}

TEST_F(RoutesCommand, ExpertsHaveTheirLoadsAndTokensTheirExperts) {
  const std::string moe =
      "--set routing.kind=mode_integrated --set experts.count=4 --set experts.noop=2 "
      "--set routing.causal.method=none ";
  e.trained("mod", "expert", moe);
  const auto j = json("expert --tokens 64 -o page.html --csv routes.csv");
  EXPECT_TRUE(j.at("routers").empty());
  ASSERT_EQ(j.at("experts").size(), 4u);
  for (const auto& layer : j.at("experts")) {
    EXPECT_EQ(layer.at("load"), nlohmann::json::parse("[16,16,16,16]"));  // 32 / 4 of each sequence
    EXPECT_FALSE(layer.contains("dropped"));
  }
  int slots = 0;
  for (const auto& row : rows_of(read_bytes(e / "routes.csv"))) {
    std::istringstream experts(row.at("experts"));
    for (std::string one; experts >> one;) ++slots;
    EXPECT_FALSE(row.at("noop_affinity").empty());
  }
  EXPECT_EQ(slots, 4 * 64);
  EXPECT_THAT(read_bytes(e / "page.html"),
              AllOf(HasSubstr("Load of the experts"), HasSubstr("Layer 3: affinities")));
  refused("expert --rule causal", 1, {"without seeing"});

  e.trained("mod", "token",
            moe + "--set experts.choice=token --set experts.top_k=2 --set experts.capacity_factor=0.5");
  const nlohmann::json trained = json("token --tokens 64"), decoded = json("token --tokens 64 --rule causal");
  for (const auto& layer : trained.at("experts")) {
    int load = 0;
    for (const int of_expert : layer.at("load")) load += of_expert;
    const double chosen = 2 * 64 * (1 - layer.at("noop_chosen").get<double>());
    EXPECT_NEAR(layer.at("dropped").get<double>(), 1 - load / chosen, 1e-9);
    EXPECT_NEAR(layer.at("experts_a_token").get<double>(), load / 64.0, 1e-9);
  }
  // Decoding drops none.
  for (const auto& layer : decoded.at("experts")) EXPECT_EQ(layer.at("dropped"), 0);
}

TEST_F(RoutesCommand, AStagedModelHasBoth) {
  e.trained("mod", "run", "--set routing.kind=mode_staged --set experts.count=2");
  const auto j = json("run --csv routes.csv");
  EXPECT_EQ(j.at("experts").at(1).at("tokens"), 8);
  EXPECT_EQ(j.at("experts").at(0).at("tokens"), 32);
  EXPECT_EQ(j.at("experts").at(1).at("load"), nlohmann::json::parse("[4,4]"));
  for (const auto& row : rows_of(read_bytes(e / "routes.csv"))) {
    EXPECT_EQ(row.at("score").empty(), row.at("layer") == "0" || row.at("layer") == "2");
    if (row.at("kept") == "0") {
      EXPECT_EQ(row.at("experts"), "");
    }
  }
}

TEST_F(RoutesCommand, AReportShowsThoseOfItsRoutedRuns) {
  e.trained("dense", "dense");
  e.trained("mod", "run");
  const auto page = [this](const std::string& more) {
    const Outcome outcome = fathom_command(e, "report dense run -o report.html " + more);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return read_bytes(e / "report.html");
  };
  const std::string drawn = "<h2>Which tokens went deep</h2>";
  EXPECT_THAT(page("--routes 48"),
              AllOf(HasSubstr(drawn), HasSubstr("run: 48 of "), HasSubstr("layer 1: 8 of 32"),
                    HasSubstr("layer 1: 4 of 16"), Not(HasSubstr("dense: 48"))));
  EXPECT_THAT(page("--routes 0"), Not(HasSubstr(drawn)));
  // A run whose text is gone is reported all the same.
  std::filesystem::remove(e / "train.valid.h5");
  EXPECT_THAT(page(""), AllOf(HasSubstr("run: not drawn."), HasSubstr("train.valid.h5")));
}

TEST_F(RoutesCommand, RefusesWhatItCannotDraw) {
  e.trained("dense", "dense");
  refused("dense -p hello", 1, {"dense", "no routed layers", "routing.kind: none"});
  e.trained("mod", "run");
  write_bytes(e / "empty.txt", "");
  write_bytes(e / "notes.txt", "keep me");
  refused("absent -p x", 1, {"absent", "does not exist"});
  refused("run -p x --file empty.txt", 2, {"2 texts", "at most one"});
  refused("run --file empty.txt", 1, {"empty"});
  write_bytes(e / "long.txt", std::string((std::size_t{64} << 20) + 1, 'a'));
  refused("run --file long.txt", 1, {"long.txt", "64 MiB", "--data"});
  refused("run --file absent.txt", 1, {"absent.txt"});
  refused("run --file .", 1, {"folder"});
  refused("run --data absent.h5", 1, {"absent.h5"});
  refused("run -p x --rule random", 2, {"--rule"});
  refused("run -p x --threshold 1", 2, {"--threshold"});
  refused("run -p x --tokens 1000000", 2, {"--tokens", "16384"});
  refused("run -p Mara --skip 4", 1, {"has 4 tokens", "4 were to be skipped"});
  refused("run --skip 100000", 1, {"100000"});
  refused("run -p x --color blue", 2, {"--color"});
  refused("run -p x -o notes.txt", 1, {"notes.txt", "HTML page"});
  refused("run -p x --csv notes.txt", 1, {"notes.txt", "CSV of routes"});
  refused("run --file notes.txt -o notes.txt", 2, {"-o"});
  refused("run -p x -o same.html --csv same.html", 2, {"--csv"});
  refused("run -p x -o absent/page.html", 1, {"absent/page.html"});
  EXPECT_EQ(read_bytes(e / "notes.txt"), "keep me");
  EXPECT_FALSE(std::filesystem::exists(e / "same.html"));
}

}  // namespace
}  // namespace fathom
