// The routes of a text with all that a picture of them says, and the pictures: for a terminal, as a page, as
// CSV and as JSON.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "train/routes/characters.h"
#include "train/routes/routes.h"

namespace fathom::routes {

struct Picture {
  std::string name;                // of the run
  std::string checkpoint;          // its path
  std::int64_t step = 0;           // of training
  std::string rule;                // "topk", "stochastic" or "causal"
  double threshold = 0.5;          // on sigma(logit)
  std::optional<double> capacity;  // C, where blocks are routed
  std::int64_t first = 0;          // token of the text that the routes start with
  std::int64_t available = 0;      // tokens of the text
  Routes routes;
  std::vector<Piece> pieces;  // of routes.tokens
};

/// "256 tokens", or "256 of 1,000 tokens, from token 512 on,".
std::string tokens_in_words(const Picture& picture);
/// How the tokens were routed, in words that follow "routed".
std::string rule_in_words(const Picture& picture);

enum class Colours { None, Indexed, Rgb };  // none; 256; 24 bits

/// The text, coloured by depth (without colours: the depths as a row of digits below it, in lines of at most
/// `columns`), a legend, and a line a routed layer and a layer of experts. Control characters of the text are
/// escaped, so that it cannot speak to the terminal.
std::string terminal_text(const Picture& picture, Colours colours, std::size_t columns);

/// A self-contained page.
std::string page(const Picture& picture);
/// What a report shows of a run: its picture, or why there is none.
struct ReportedRun {
  std::string name;
  std::optional<Picture> picture;
  std::string why_not;
};
/// A part of a report: text, heat maps and histograms of each run. Empty without runs.
std::string report_section(std::span<const ReportedRun> runs);

/// The text in HTML, each token's depth as its background; radio buttons show one layer instead. `id` starts
/// the ids of its elements, and is to be unique in the page.
std::string text_html(const Picture& picture, const std::string& id);
/// What text_html needs to be walked with the arrow keys: an inline script, once a page.
std::string arrow_keys();

/// A line a token and layer, RFC 4180; the columns stand in docs/commands.md.
std::string csv(const Picture& picture);
/// Whether the text starts as one of `csv` does.
bool is_csv(std::string_view start);

/// One line; keys as in docs/commands.md.
std::string json(const Picture& picture);

}  // namespace fathom::routes
