// What every page has to be: well-formed, self-contained, without numbers that are none.
#pragma once

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace fathom::testing_support {

/// Every element that is opened is closed, in order; so a browser sees the tree that was meant.
inline void expect_well_formed(const std::string& html) {
  std::vector<std::string> open;
  const std::string voids = " meta br !DOCTYPE ";
  for (std::size_t at = html.find('<'); at != std::string::npos; at = html.find('<', at + 1)) {
    const std::size_t end = html.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = html.substr(at + 1, end - at - 1);
    const std::string name = tag.substr(0, tag.find_first_of(" \n"));
    if (tag.back() == '/' || voids.find(" " + name + " ") != std::string::npos) continue;
    if (name[0] != '/') {
      open.push_back(name);
    } else {
      ASSERT_FALSE(open.empty()) << tag;
      ASSERT_EQ("/" + open.back(), name) << html.substr(at > 200 ? at - 200 : 0, 260);
      open.pop_back();
    }
  }
  EXPECT_TRUE(open.empty()) << open.back();
}

inline void expect_no_bad_numbers(const std::string& html) {
  const std::string body = html.substr(html.find("<body>"));
  for (const char* bad : {"\"nan", "\"inf", "\"-nan", "\"-inf", " nan", "-nan"})
    EXPECT_EQ(body.find(bad), std::string::npos) << bad;
}

inline void expect_self_contained(const std::string& html) {
  for (const char* outside : {"http:", "https:", "src=", "@import", "<link", "url(h"})
    EXPECT_EQ(html.find(outside), std::string::npos) << outside;
}

}  // namespace fathom::testing_support
