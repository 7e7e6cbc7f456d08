// The parts of a report, each as HTML; and the summary as CSV and JSON.
#pragma once

#include <span>
#include <string>

#include "train/report/run_data.h"

namespace fathom::report {

std::string verdict(std::span<const RunData> runs);
std::string summary_table(std::span<const RunData> runs);
std::string loss_charts(std::span<const RunData> runs);
std::string optimizer_charts(std::span<const RunData> runs);
std::string routing_section(std::span<const RunData> runs);    // empty without a routed run
std::string experts_section(std::span<const RunData> runs);    // empty without a run of experts
std::string breakdown_section(std::span<const RunData> runs);  // empty without a plan.json
std::string samples_section(std::span<const RunData> runs);    // empty without samples
std::string events_section(std::span<const RunData> runs);
std::string config_section(std::span<const RunData> runs);

/// One line a run, with a head; lists by layer are joined by spaces. RFC 4180.
std::string summary_csv(std::span<const RunData> runs);
/// {"runs": [{...}]}, one line; "warning" when their losses do not compare.
std::string summary_json(std::span<const RunData> runs);

}  // namespace fathom::report
