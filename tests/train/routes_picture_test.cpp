// The pictures of routes: any text in them is shown and harmless.
#include <sstream>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "tests/train/html_checks.h"
#include "train/routes/picture.h"

namespace fathom::routes {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::vector<std::string> texts(const std::vector<Piece>& pieces) {
  std::vector<std::string> out;
  out.reserve(pieces.size());
  for (const Piece& p : pieces) out.push_back(p.text);
  return out;
}

std::vector<Piece> pieces(const std::string& text) {
  const ByteTokenizer bytes;
  std::vector<Piece> out = pieces_of(bytes.encode(text), &bytes);
  std::size_t at = 0;  // every token stands in one piece
  for (const Piece& p : out) {
    EXPECT_EQ(p.first, at);
    EXPECT_GT(p.last, p.first);
    at = p.last;
  }
  EXPECT_EQ(at, text.size());
  return out;
}

TEST(RoutesPieces, BytesOfACharacterAreOne) {
  EXPECT_THAT(texts(pieces("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80.")),
              ElementsAre("a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "."));
}

TEST(RoutesPieces, BytesThatMakeNoCharacterAreShownAsBytes) {
  EXPECT_THAT(texts(pieces("a\xE2\x82")), ElementsAre("a", "<0xE2>", "<0x82>"));
  EXPECT_THAT(texts(pieces("\xE2x")), ElementsAre("<0xE2>", "x"));
  EXPECT_THAT(texts(pieces("\xE2\xC3\xA9")), ElementsAre("<0xE2>", "\xC3\xA9"));
  EXPECT_THAT(texts(pieces("\x80\xFF\xC0\xAF")), ElementsAre("<0x80>", "<0xFF>", "<0xC0>", "<0xAF>"));
  EXPECT_THAT(texts(pieces("\xED\xA0\x80")), ElementsAre("<0xED>", "<0xA0>", "<0x80>"));  // a surrogate
  EXPECT_TRUE(pieces("\xE2x")[0].mark);
  EXPECT_FALSE(pieces("\xE2x")[1].mark);
}

TEST(RoutesPieces, ControlTokensAndIdsAreMarks) {
  const ByteTokenizer bytes;
  EXPECT_THAT(texts(pieces_of({'a', ByteTokenizer::kEndOfDocument, 'b'}, &bytes)),
              ElementsAre("a", "<end of document>", "b"));
  EXPECT_THAT(texts(pieces_of({7, 300}, nullptr)), ElementsAre("<7>", "<300>"));
}

TEST(RoutesPieces, ControlCharactersDoNotReachTheTerminal) {
  EXPECT_EQ(printable("a\x1b[31m\r\n\tb\x7f\xC2\x9B\xC3\xA9"), "a\\x1b[31m\\x0d\\n\\tb\\x7f\\x9b\xC3\xA9");
  EXPECT_EQ(columns_of("ab\xC3\xA9"), 3u);
  EXPECT_EQ(columns_of("e\xCC\x81"), 1u);                                 // a combining accent
  EXPECT_EQ(columns_of("\xE6\x97\xA5\xE6\x9C\xAC\xF0\x9F\x98\x80"), 6u);  // wide characters
}

// A router at layer 1 of 2 that keeps every second token, of `text` in bytes.
Picture picture(const std::string& text, std::int64_t seq_len = 1000) {
  const ByteTokenizer bytes;
  Picture p;
  p.name = "runs/<mod>";
  p.checkpoint = "runs/<mod>/step.h5";
  p.rule = "topk";
  p.routes.blocks = 2;
  p.routes.seq_len = seq_len;
  p.routes.tokens = bytes.encode(text);
  p.available = static_cast<std::int64_t>(text.size());
  RoutedTokens layer{1, {}, {}, {}};
  for (std::size_t i = 0; i < text.size(); ++i) {
    layer.scores.push_back(i % 2 == 0 ? 1.5 : -0.25);
    layer.kept.push_back(i % 2 == 0 ? 1 : 0);
  }
  p.routes.routed.push_back(layer);
  p.pieces = pieces_of(p.routes.tokens, &bytes);
  return p;
}

// Two experts and a no-op at each of two layers; the first takes the token, the second was chosen and is
// full.
Picture with_experts(const std::string& text) {
  Picture p = picture(text);
  p.routes.routed.clear();
  const std::size_t n = text.size();
  for (const std::int64_t layer : {0, 1}) {
    ExpertTokens e{layer,
                   2,
                   1,
                   std::vector<std::uint8_t>(n, 1),
                   std::vector<double>(3 * n, 0.25),
                   std::vector<std::uint8_t>(2 * n),
                   std::vector<std::uint8_t>(3 * n)};
    for (std::size_t i = 0; i < n; ++i) {
      e.taken[i] = 1;
      e.chosen[i] = e.chosen[n + i] = 1;
      e.affinity[i] = 0.5;
    }
    p.routes.experts.push_back(std::move(e));
  }
  return p;
}

TEST(RoutesTerminal, WithoutColoursDepthsStandBelowTheirTokens) {
  EXPECT_THAT(terminal_text(picture("abc\nde"), Colours::None, 80),
              AllOf(HasSubstr("  abc\\n\n  1.1.\n\n  de\n  1.\n"), Not(HasSubstr("\x1b"))));
  // A wide character takes two columns and three tokens, of which the deepest counts.
  EXPECT_THAT(terminal_text(picture("x\xE6\x97\xA5yz"), Colours::None, 80),
              HasSubstr("  x\xE6\x97\xA5yz\n  11 1.\n"));
  EXPECT_THAT(terminal_text(picture("abcdefghijklmnopqrstuvwxyz"), Colours::None, 20),
              HasSubstr("  abcdefghijklmnopqr\n  1.1.1.1.1.1.1.1.1.\n\n  stuvwxyz\n"));
}

TEST(RoutesTerminal, ColoursEndWithEveryTokenAndTheTextBringsNoneOfItsOwn) {
  const std::string text = terminal_text(picture("a\x1b[2Jb"), Colours::Rgb, 80);
  EXPECT_THAT(text, AllOf(HasSubstr("\x1b[48;2;"), HasSubstr("\\x1b"), Not(HasSubstr("\x1b[2J"))));
  EXPECT_THAT(terminal_text(picture("ab"), Colours::Indexed, 80), HasSubstr("\x1b[48;5;"));
  std::size_t on = 0, off = 0;
  for (std::size_t at = text.find("\x1b["); at != std::string::npos; at = text.find("\x1b[", at + 1))
    ++(text.compare(at, 4, "\x1b[0m") == 0 ? off : on);
  EXPECT_EQ(on, off);
  EXPECT_GT(on, 3u);
}

TEST(RoutesTerminal, SaysWhatBecameOfTheExperts) {
  const std::string text = terminal_text(with_experts("abcd"), Colours::None, 80);
  EXPECT_THAT(text, AllOf(HasSubstr("  abcd\n  2222\n"), HasSubstr("50.0 %"), HasSubstr("4 0\n")));
}

TEST(RoutesPage, IsSelfContainedAndItsTextIsText) {
  const std::string nasty = "</div><script>alert(1)</script>&amp;\"'\x01\xE2\n";
  for (const Picture& p : {picture(nasty), with_experts(nasty), picture(nasty, 7)}) {
    const std::string html = page(p);
    testing_support::expect_well_formed(html);
    testing_support::expect_no_bad_numbers(html);
    testing_support::expect_self_contained(html);
    EXPECT_THAT(html,
                AllOf(Not(HasSubstr("<script>alert")), Not(HasSubstr("runs/<mod>")), Not(HasSubstr("\x01")),
                      HasSubstr("runs/&lt;mod&gt;"), HasSubstr("&lt;0xE2&gt;")));
    EXPECT_THAT(html, HasSubstr("prefers-color-scheme: dark"));
  }
  EXPECT_THAT(page(picture(nasty, 7)), HasSubstr(">sequence 2<"));
}

TEST(RoutesPage, HasACellForWhatWasComputedAndAHistogramOfTheRouter) {
  const std::string html = page(picture("abcdef"));
  // Every second of six tokens, alone: three rectangles of one path.
  EXPECT_THAT(
      html, AllOf(HasSubstr("<title>layer 1: 3 of 6</title>"), HasSubstr("<title>layer 0: 6 of 6</title>")));
  EXPECT_THAT(html, AllOf(HasSubstr("Layer 1: router weights r"), HasSubstr("50.0 % of the tokens have"),
                          HasSubstr("\xCF\x83 = 0.5")));
  EXPECT_THAT(html, HasSubstr("&quot;a&quot;  token 97, position 0\nlayer 1: computed, r 1.500"));
  const std::string experts = page(with_experts("ab"));
  EXPECT_THAT(experts, AllOf(HasSubstr("layer 0: expert 0 (0.50), no room with 1"),
                             HasSubstr("Load of the experts"), HasSubstr("Layer 1: affinities")));
}

TEST(RoutesReport, ShowsRunsOrSaysWhyNot) {
  EXPECT_EQ(report_section({}), "");
  const std::vector<ReportedRun> runs{
      {"a<b", picture("abc"), {}}, {"c", {}, "no <store>"}, {"d", with_experts("ab"), {}}};
  const std::string html = report_section(runs);
  testing_support::expect_well_formed(html);
  EXPECT_THAT(html, AllOf(HasSubstr("a&lt;b: 3 tokens of its validation text"),
                          HasSubstr("c: not drawn. no &lt;store&gt;"), HasSubstr("id=\"shade0-1\""),
                          HasSubstr("id=\"shade2-1\""), Not(HasSubstr("<script"))));
}

TEST(RoutesTerminal, SaysWhichPartOfTheTextItShows) {
  Picture p = picture("abc");
  EXPECT_EQ(tokens_in_words(p), "3 tokens");
  p.available = 2000;
  EXPECT_EQ(tokens_in_words(p), "3 of 2,000 tokens");
  p.first = 1024;
  EXPECT_EQ(tokens_in_words(p), "3 of 2,000 tokens, from token 1,024 on,");
}

TEST(RoutesTables, CsvHasALineATokenAndLayer) {
  EXPECT_EQ(
      csv(picture("a,\"", 2)),
      "sequence,position,token,text,layer,score,predicted,kept,experts,affinities,noop_affinity,dropped\r\n"
      "0,0,97,a,1,1.5,,1,,,,\r\n"
      "0,1,44,\",\",1,-0.25,,0,,,,\r\n"
      "1,0,34,\"\"\"\",1,1.5,,1,,,,\r\n");
  EXPECT_THAT(csv(with_experts("a")), AllOf(HasSubstr("0,0,97,a,0,,,1,0,0.5,0.25,1\r\n"),
                                            HasSubstr("0,0,97,a,1,,,1,0,0.5,0.25,1\r\n")));
  EXPECT_TRUE(is_csv(csv(picture("a"))));
  EXPECT_FALSE(is_csv("name,status,flops_per_token_train\r\n"));
}

TEST(RoutesTables, JsonHasTheSameFigures) {
  const auto j = nlohmann::json::parse(json(picture("abc")));
  EXPECT_EQ(j.at("depths"), nlohmann::json::parse("[1,0,1]"));
  EXPECT_EQ(j.at("routers").at(0).at("kept"), 2);
  EXPECT_EQ(j.at("routers").at(0).at("kept_tokens"), nlohmann::json::parse("[0,2]"));
  EXPECT_TRUE(j.at("experts").empty());
  const auto e = nlohmann::json::parse(json(with_experts("abc")));
  EXPECT_EQ(e.at("experts").at(1).at("load"), nlohmann::json::parse("[3,0]"));
  EXPECT_EQ(e.at("experts").at(0).at("dropped"), 0.5);
}

}  // namespace
}  // namespace fathom::routes
