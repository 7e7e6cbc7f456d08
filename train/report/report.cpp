#include "train/report/report.h"

#include <ctime>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/units.h"
#include "src/io/atomic_file.h"
#include "src/io/output_file.h"
#include "train/report/html.h"
#include "train/report/run_data.h"
#include "train/report/sections.h"

namespace fathom {
namespace report {

using Runs = std::span<const RunData>;

std::string samples_section(Runs runs) {
  std::string out;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].samples.empty()) continue;
    out += fmt::format("<h3><i class=\"swatch s{}\"></i>{}</h3>\n", i % 8, escape(runs[i].name));
    for (const Sample& s : runs[i].samples) {
      out += "<pre class=\"sample\"><b>" + escape(s.prompt) + "</b>" + escape(s.text) + "</pre>\n";
    }
  }
  return out.empty() ? out : "<h2>What the models write</h2>\n" + out;
}

std::string events_section(Runs runs) {
  std::string out;
  for (const RunData& run : runs) {
    Table t;
    t.head = {"Step", "after", "event", "when"};
    for (const EventRecord& e : run.metrics.events) {
      std::string what = name_of(e.kind);
      if (e.status) what += std::string(", ") + name_of(*e.status);
      if (!e.checkpoint.empty()) what += ": " + e.checkpoint;
      if (!e.message.empty()) what += ": " + e.message;
      t.rows.push_back({std::to_string(e.step), format_duration(e.seconds), escape(what), escape(e.time)});
    }
    if (!t.rows.empty()) {
      out += fmt::format("<details><summary>{} ({} events)</summary>\n{}</details>\n", escape(run.name),
                         t.rows.size(), render(t));
    }
  }
  return out.empty() ? out : "<h2>Events</h2>\n" + out;
}

std::string config_section(Runs runs) {
  std::string out;
  for (const RunData& run : runs) {
    const RunSummary& s = run.summary;
    std::string facts;
    if (!s.device.empty()) facts += "device " + s.device + "  ";
    if (s.seed) facts += fmt::format("seed {}  ", *s.seed);
    if (!s.git_sha.empty()) facts += "git " + s.git_sha;
    if (run.config.empty() && facts.empty()) continue;
    out += "<details><summary>" + escape(run.name) + "</summary>\n<p class=\"sub\">" + escape(facts) +
           "</p>\n<pre>" + escape(run.config.empty() ? "no config.yaml in the run folder" : run.config) +
           "</pre></details>\n";
  }
  return out.empty() ? out : "<h2>Resolved configurations</h2>\n" + out;
}

namespace {

std::string title_of(Runs runs) {
  if (runs.size() == 1) return "Training run " + runs[0].name;
  if (runs.size() == 2) return runs[0].name + " and " + runs[1].name;
  return fmt::format("{} training runs", runs.size());
}

std::string utc_today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  char text[32];
  gmtime_r(&now, &parts);
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", &parts);
  return text;
}

}  // namespace
}  // namespace report

namespace report {
namespace {

// Its first line names columns that every report has; a newer version may have more.
bool is_report_csv(const std::string& path) {
  constexpr std::size_t kEnough = 4096;
  const std::string start = start_of_file(path, kEnough);
  const std::string head = "," + start.substr(0, start.find_first_of("\r\n")) + ",";
  return head.find(",name,") != std::string::npos &&
         head.find(",flops_per_token_train,") != std::string::npos;
}

void require_writable(std::span<const std::filesystem::path> runs, const std::filesystem::path& html,
                      const std::filesystem::path& csv) {
  std::vector<std::string> inputs;
  for (const std::filesystem::path& run : runs) {
    for (const char* name : {"metrics.jsonl", "config.yaml", "plan.json", "samples.json", "samples.txt"})
      inputs.push_back((run / name).string());
  }
  require_no_input("-o", html.string(), inputs);
  require_no_input("the page's CSV", csv.string(), inputs);
  require_replaceable(html.string(), "an HTML page", is_html_file);
  require_replaceable(csv.string(), "a report's CSV", is_report_csv);
}

}  // namespace
}  // namespace report

void write_report(std::span<const std::filesystem::path> runs, const std::filesystem::path& html,
                  const ReportSection& section) {
  using namespace report;
  std::filesystem::path csv = html;
  csv.replace_extension(".csv");
  if (csv == html) {
    throw UsageError("the report " + html.string() + " would be overwritten by its own CSV file.",
                     "Give a name that ends in .html.");
  }
  require_writable(runs, html, csv);
  const std::vector<RunData> data = load_runs(runs);
  const std::string title = title_of(data);
  std::string body = "<header>\n<h1>" + escape(title) + "</h1>\n<p class=\"sub\">Fathom report, written " +
                     utc_today() + "</p>\n" + verdict(data) + "</header>\n";
  std::vector<std::string> names;
  for (const RunData& run : data) names.push_back(run.name);
  body += summary_table(data) + loss_charts(data) + routing_section(data) + experts_section(data) +
          (section ? section(names) : "") + optimizer_charts(data) + breakdown_section(data) +
          samples_section(data) + events_section(data) + config_section(data);
  body += "<footer>The numbers above are in " + escape(csv.filename().string()) +
          "; the curves are drawn from each run's metrics.jsonl. Losses are in nats a token; a FLOP count "
          "takes a multiply-add as two.</footer>\n";
  write_file(html.string(), page(title, body));
  write_file(csv.string(), summary_csv(data));
}

std::string report_json(std::span<const std::filesystem::path> runs) {
  return report::summary_json(report::load_runs(runs));
}

}  // namespace fathom
