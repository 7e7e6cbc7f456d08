// The page at / in a browser: somebody types, a text comes piece by piece, and a strip says where it went.
#include <cstdlib>
#include <fstream>
#include <vector>

#include <gmock/gmock.h>

#include "tests/serve/browser.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class Page : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Browser::program().empty()) GTEST_SKIP() << "There is no Chromium.";
    server_.open();
    browser_ = std::make_unique<Browser>("http://127.0.0.1:" + std::to_string(server_.port()) + "/");
    ASSERT_TRUE(browser_->becomes("document.getElementById('model')?.textContent == '· tiny'"));
  }
  std::string text_of(const std::string& id) {
    return browser_->evaluate("document.getElementById('" + id + "').textContent");
  }
  void set(const std::string& id, const std::string& value) {
    browser_->evaluate("document.getElementById('" + id + "').value = '" + value + "'");
  }
  bool is_idle() { return browser_->becomes("!document.getElementById('go').disabled"); }
  std::int64_t painted() {
    return browser_->evaluate(
        "(() => { const c = document.querySelector('#strip canvas'); const d = "
        "c.getContext('2d').getImageData(0, 0, "
        "c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; "
        "})()");
  }
  /// Pixels that the page is wider than what shows it, at several widths.
  std::vector<std::int64_t> overhangs(const std::string& name) {
    std::vector<std::int64_t> all;
    for (const int width : {200, 360, 768, 1280}) {
      browser_->resize(width, 900);
      all.push_back(
          browser_->evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"));
      take_picture(name + "_" + std::to_string(width));
    }
    return all;
  }
  /// Kept for who looks: FATHOM_SCREENSHOTS is a folder.
  void take_picture(const std::string& name) {
    const std::string png = browser_->screenshot();
    EXPECT_THAT(png, StartsWith("\x89PNG"));
    EXPECT_GT(png.size(), 5000U);
    if (const char* folder = std::getenv("FATHOM_SCREENSHOTS"); folder != nullptr)
      std::ofstream(std::string(folder) + "/" + name + ".png", std::ios::binary) << png;
  }

  TinyServer server_;
  std::unique_ptr<Browser> browser_;
};

TEST_F(Page, WritesWhatIsTypedAndShowsWhereItWent) {
  // The prompt has the focus from the beginning.
  EXPECT_EQ(browser_->evaluate("document.activeElement.id"), "prompt");
  EXPECT_EQ(browser_->evaluate("getComputedStyle(document.getElementById('keys')).display"), "none");
  browser_->evaluate("document.activeElement.select()");
  browser_->type("A river, and then");
  set("tokens", "60");
  set("temperature", "0");
  browser_->press("Enter", 2);
  ASSERT_TRUE(browser_->becomes("document.getElementById('status').textContent.includes(' tokens')"))
      << text_of("status");
  EXPECT_THAT(text_of("answer"), StartsWith("A river, and then"));
  EXPECT_GT(browser_->evaluate("document.getElementById('answer').textContent.length"), 17);
  EXPECT_GT(browser_->evaluate("parseInt(document.getElementById('status').textContent)"), 3)
      << text_of("status");
  // A column for each token that was computed: all but the last one.
  EXPECT_EQ(browser_->evaluate("document.getElementById('routing').hidden"), false);
  const std::int64_t columns = browser_->evaluate("strip.kept.length");
  EXPECT_GT(columns, 17);
  EXPECT_LE(columns, 17 + 59);
  EXPECT_EQ(browser_->evaluate("strip.prompt"), 17);
  EXPECT_EQ(browser_->evaluate("strip.layers.length"), 2);
  const std::int64_t marks = painted();
  EXPECT_GT(marks, 0);
  EXPECT_THAT(text_of("depth"), HasSubstr("% of the tokens"));
  take_picture("light");
  // By keyboard through the strip.
  browser_->evaluate("document.getElementById('strip').focus()");
  browser_->press("ArrowRight");
  EXPECT_THAT(text_of("here"), HasSubstr("token 1 of the text to go on from"));
  const std::string light =
      browser_->evaluate("getComputedStyle(document.querySelector('#strip canvas')).color");
  browser_->prefer("dark");
  EXPECT_NE(browser_->evaluate("getComputedStyle(document.querySelector('#strip canvas')).color"), light);
  EXPECT_TRUE(browser_->becomes("strip.drawn == strip.kept.length"));
  EXPECT_EQ(painted(), marks);
  take_picture("dark");
}

TEST_F(Page, IsNeverWiderThanItsWindow) {
  const auto none = Each(0);
  EXPECT_THAT(overhangs("empty"), none);
  browser_->evaluate("$('prompt').value = 'm'.repeat(300)");
  set("tokens", "150");
  browser_->press("Enter", 2);
  ASSERT_TRUE(browser_->becomes("document.getElementById('status').textContent.includes(' tokens')"))
      << text_of("status");
  // Many times as wide as the window, and it is the strip that scrolls.
  EXPECT_GT(browser_->evaluate("$('strip').scrollWidth"), 2300);
  EXPECT_EQ(browser_->evaluate("$('strip').scrollWidth - strip.kept.length * strip.cell"), 0);
  browser_->evaluate("point(5)");
  EXPECT_THAT(overhangs("answered"), none);
  // What has no place to be broken: a model's name, what the server says; and a key is asked for.
  browser_->evaluate("$('model').textContent = 'a_name_'.repeat(40)");
  browser_->evaluate("refused(401, JSON.stringify({error: {message: 'no'.repeat(200)}}))");
  EXPECT_EQ(browser_->evaluate("$('keys').hidden"), false);
  EXPECT_THAT(overhangs("refused"), none);
}

TEST_F(Page, TurnsTheDialAndStops) {
  EXPECT_EQ(browser_->evaluate("document.getElementById('dial').hidden"), false);
  const auto marks_at = [&](const std::string& threshold) {
    set("threshold", threshold);
    set("temperature", "0");
    set("tokens", "30");
    browser_->press("Enter", 2);
    EXPECT_TRUE(is_idle());
    return browser_->evaluate("strip.kept.join('').replaceAll('0', '').length / strip.kept.length")
        .get<double>();
  };
  EXPECT_GT(marks_at("0.1"), marks_at("0.9"));
  set("threshold", "2");
  browser_->press("Enter", 2);
  EXPECT_TRUE(is_idle());
  EXPECT_THAT(text_of("status"), HasSubstr("routing_threshold"));
  set("threshold", "");
  set("tokens", "480");
  browser_->press("Enter", 2);
  ASSERT_TRUE(browser_->becomes("going != null"));
  browser_->press("Escape");
  EXPECT_TRUE(is_idle());
  EXPECT_TRUE(server_.all_blocks_free());
}

}  // namespace
}  // namespace fathom::serve
