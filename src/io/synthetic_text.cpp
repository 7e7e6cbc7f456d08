#include "src/io/synthetic_text.h"

#include <array>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/core/splitmix64.h"
#include "src/io/atomic_file.h"
#include "src/io/output_file.h"

namespace fathom {

namespace {

class Random : public SplitMix64 {
 public:
  using SplitMix64::SplitMix64;
  template <typename Array>
  const auto& pick(const Array& choices) {
    return choices[below(choices.size())];
  }
};

struct Person {
  std::string_view name;
  std::string_view pronoun;
  std::string_view town;
  std::string_view pet;
};

struct Verb {
  std::string_view one;   // with "the dog"
  std::string_view many;  // with "the dogs"
};

constexpr std::array<std::string_view, 8> kWomen = {"Mara", "Ilse",  "Ruth", "Nadia",
                                                    "Vera", "Edith", "Joan", "Lena"};
constexpr std::array<std::string_view, 8> kMen = {"Tom",  "Oskar", "Hugo", "Piet",
                                                  "Amos", "Karl",  "Ned",  "Ivan"};
constexpr std::array<std::string_view, 8> kTowns = {"Lune", "Arden", "Wick", "Holt",
                                                    "Skye", "Bray",  "Ely",  "Dover"};
constexpr std::array<std::string_view, 8> kAnimals = {"dog",   "cat",  "hen", "goat",
                                                      "horse", "duck", "cow", "pig"};
constexpr std::array<std::string_view, 6> kColours = {"red", "black", "white", "brown", "grey", "old"};
constexpr std::array<Verb, 8> kVerbs = {{{"runs", "run"},
                                         {"sleeps", "sleep"},
                                         {"waits", "wait"},
                                         {"sings", "sing"},
                                         {"eats", "eat"},
                                         {"hides", "hide"},
                                         {"looks up", "look up"},
                                         {"walks home", "walk home"}}};
constexpr std::array<std::string_view, 10> kNumbers = {"one", "two",   "three", "four", "five",
                                                       "six", "seven", "eight", "nine", "ten"};
constexpr std::array<std::string_view, 3> kOpen = {"(", "[", "{"};
constexpr std::array<std::string_view, 3> kClose = {")", "]", "}"};

Person make_person(Random& random, const std::vector<Person>& others) {
  for (;;) {
    Person p;
    const bool woman = random.below(2) == 0;
    p.name = woman ? random.pick(kWomen) : random.pick(kMen);
    p.pronoun = woman ? "She" : "He";
    p.town = random.pick(kTowns);
    p.pet = random.pick(kAnimals);
    bool is_new = true;
    for (const Person& other : others) is_new = is_new && other.name != p.name;
    if (is_new) return p;
  }
}

// How every document begins, and so every file.
std::string beginning(std::string_view name, std::string_view town) {
  return fmt::format("{} lives in {}. ", name, town);
}

std::string introduce(const Person& p) {
  return beginning(p.name, p.town) + fmt::format("{} has a {}.", p.pronoun, p.pet);
}

bool is_synthetic_text(const std::string& path) {
  constexpr std::string_view json_begins = "{\"text\":\"";
  const std::string start = start_of_file(path, 64);
  std::string_view text = start;
  if (text.starts_with(json_begins)) text.remove_prefix(json_begins.size());
  for (const auto& names : {kWomen, kMen}) {
    for (const std::string_view name : names) {
      for (const std::string_view town : kTowns) {
        if (text.starts_with(beginning(name, town))) return true;
      }
    }
  }
  return false;
}

std::string ask(Random& random, const Person& p) {
  if (random.below(2) == 0) return fmt::format("Where does {} live? {} lives in {}.", p.name, p.name, p.town);
  return fmt::format("What does {} have? {} has a {}.", p.name, p.name, p.pet);
}

// Number agreement, also across words that stand between the subject and its verb.
std::string agree(Random& random) {
  const Verb& verb = random.pick(kVerbs);
  const std::string_view animal = random.pick(kAnimals);
  const std::string_view colour = random.pick(kColours);
  const std::string_view near = random.pick(kAnimals);
  const bool many = random.below(2) == 0;
  const std::string subject =
      many ? fmt::format("The {} {} {}s", kNumbers[1 + random.below(9)], colour, animal)
           : fmt::format("The {} {}", colour, animal);
  const std::string beside =
      random.below(3) > 0 ? "" : fmt::format(" near the {}{}", near, random.below(2) == 0 ? "s" : "");
  return fmt::format("{}{} {}.", subject, beside, many ? verb.many : verb.one);
}

std::string count_up(Random& random, const Person& p) {
  const std::size_t last = 2 + random.below(kNumbers.size() - 2);
  std::string text = fmt::format("{} counts:", p.name);
  for (std::size_t i = 0; i <= last; ++i) text += fmt::format(" {}{}", kNumbers[i], i == last ? "." : ",");
  return text;
}

void nest(Random& random, std::size_t depth, std::string& text) {
  const std::size_t kind = random.below(kOpen.size());
  text += kOpen[kind];
  if (depth > 0) {
    const std::size_t inner = 1 + random.below(2);
    for (std::size_t i = 0; i < inner; ++i) nest(random, random.below(depth), text);
  } else {
    text += random.pick(kColours);
  }
  text += kClose[kind];
}

std::string brackets(Random& random) {
  std::string text = "The box is ";
  nest(random, 1 + random.below(3), text);
  return text + ".";
}

}  // namespace

std::string synthetic_document(std::uint64_t seed, std::uint64_t index) {
  // Two rounds of mixing keep neighbouring seeds and indices apart.
  Random random(Random(Random(seed).next() ^ (index * 0xD1342543DE82EF95u)).next());
  std::vector<Person> people;
  const std::size_t count = 2 + random.below(3);
  for (std::size_t i = 0; i < count; ++i) people.push_back(make_person(random, people));
  std::string text;
  for (const Person& p : people) text += (text.empty() ? "" : " ") + introduce(p);
  text += "\n";
  const std::size_t paragraphs = 1 + random.below(5);
  for (std::size_t i = 0; i < paragraphs; ++i) {
    const std::size_t sentences = 3 + random.below(6);
    for (std::size_t s = 0; s < sentences; ++s) {
      if (s > 0) text += " ";
      const Person& p = random.pick(people);
      switch (random.below(5)) {
        case 0:
        case 1:
          text += ask(random, p);
          break;
        case 2:
          text += agree(random);
          break;
        case 3:
          text += count_up(random, p);
          break;
        default:
          text += brackets(random);
          break;
      }
    }
    text += "\n";
  }
  return text;
}

std::string synthetic_text(std::int64_t bytes, std::uint64_t seed) {
  std::string text;
  for (std::uint64_t i = 0; static_cast<std::int64_t>(text.size()) < bytes; ++i) {
    text += (i == 0 ? "" : "\n") + synthetic_document(seed, i);
  }
  return text;
}

std::int64_t write_synthetic_text(const std::string& path, std::int64_t bytes, std::uint64_t seed) {
  if (bytes < 1) throw UsageError(fmt::format("--bytes {} is too small.", bytes), "Give at least 1.");
  require_replaceable(path, "synthetic text", is_synthetic_text);
  const bool json = path.size() > 6 && path.substr(path.size() - 6) == ".jsonl";
  AtomicFile file(path);
  std::string pending;
  std::int64_t written = 0;
  std::uint64_t documents = 0;
  while (written < bytes) {
    const std::string document = synthetic_document(seed, documents);
    const std::string_view separator = documents == 0 || json ? "" : "\n";
    written += static_cast<std::int64_t>(separator.size() + document.size());
    pending += separator;
    pending += json ? nlohmann::json{{"text", document}}.dump() + "\n" : document;
    ++documents;
    if (pending.size() > (std::size_t{1} << 20)) {
      file.write(pending);
      pending.clear();
    }
  }
  file.write(pending);
  file.commit();
  return static_cast<std::int64_t>(documents);
}

}  // namespace fathom
