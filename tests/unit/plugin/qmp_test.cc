#include "plugin/qemu/qmp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/plugin/fake_qmp.h"

namespace qvmstate::qemu {
namespace {

using testing::FakeQmp;
using testing::greeting;
using ::testing::HasSubstr;
using testing::returns;
using testing::TemporaryFolder;

/// Agrees to qmp_capabilities, and gives `reply` to anything else.
FakeQmp::Answer then(FakeQmp::Answer reply) {
  return [reply](const Json &request) {
    return text_at(request, "execute") == "qmp_capabilities" ? testing::agree(request)
                                                             : reply(request);
  };
}

TEST(Qmp, ReadsTheVersionFromTheGreeting) {
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), greeting, testing::agree);
  auto qmp = Qmp::connect(folder.file("q"));
  ASSERT_TRUE(qmp) << qmp.error().message;
  EXPECT_EQ((*qmp)->version(), "11.1.3");
  EXPECT_EQ((*qmp)->version_major(), 11U);
}

TEST(Qmp, SkipsEventsAndAnswersToOthers) {
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), greeting, then([](const Json &request) {
                   return "{\"event\":\"STOP\",\"data\":{}}\r\n"
                          "{\"return\":\"another's\",\"id\":\"saver-7\"}\r\n"
                          "{\"error\":{\"desc\":\"stray\"}}\r\n" +
                          returns(request, "ours");
                 }));
  auto qmp = Qmp::connect(folder.file("q"));
  ASSERT_TRUE(qmp);
  auto answer = (*qmp)->execute("x");
  ASSERT_TRUE(answer) << answer.error().message;
  EXPECT_EQ(*answer, "ours");
}

TEST(Qmp, ReportsRefusalsInQemusWordsAndStaysUsable) {
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), greeting, then([](const Json &request) {
                   if (text_at(request, "execute") == "bad") {
                     return Json({{"error", {{"class", "GenericError"}, {"desc", "no lock"}}},
                                  {"id", at(request, "id")}})
                                .dump() +
                            "\n";
                   }
                   return returns(request, 5);
                 }));
  auto qmp = Qmp::connect(folder.file("q"));
  ASSERT_TRUE(qmp);
  auto refused = (*qmp)->execute("bad");
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::peer);
  EXPECT_EQ(refused.error().message, "QEMU refused 'bad': no lock");
  EXPECT_TRUE((*qmp)->alive());
  EXPECT_TRUE((*qmp)->execute("good"));
}

TEST(Qmp, SaysThatAnotherClientHoldsTheSocket) {
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), "", testing::agree);
  auto qmp = Qmp::connect(folder.file("q"), milliseconds(50));
  ASSERT_FALSE(qmp);
  EXPECT_THAT(qmp.error().message, HasSubstr("second -qmp"));
}

TEST(Qmp, RefusesASocketThatSpeaksSomethingElse) {
  for (const std::string hello :
       {"QEMU 7.2.0 monitor\n", "{}\n", "[1,2]\n", "\n", "{\"QMP\":3}\n"}) {
    const TemporaryFolder folder;
    FakeQmp server(folder.file("q"), hello, testing::agree);
    auto qmp = Qmp::connect(folder.file("q"));
    ASSERT_FALSE(qmp) << hello;
    EXPECT_THAT(qmp.error().message, HasSubstr("not QMP's"));
  }
}

TEST(Qmp, NamesAMissingSocket) {
  auto qmp = Qmp::connect("/nowhere/socket");
  ASSERT_FALSE(qmp);
  EXPECT_EQ(qmp.error().code, ErrorCode::not_found);
  EXPECT_THAT(qmp.error().message, HasSubstr("'/nowhere/socket'"));
  EXPECT_FALSE(Qmp::connect(std::string(200, 'x')));
}

TEST(Qmp, FailsOnGarbageCloseAndSilence) {
  struct Case {
    std::string reply;
    std::string words;
  };
  for (const Case &wrong :
       {Case{"{\"return\":", "closed the connection"}, Case{"\xff\xfe garbage\n", "no JSON"},
        Case{"", "closed the connection"}}) {
    const TemporaryFolder folder;
    FakeQmp server(folder.file("q"), greeting,
                   then([&](const Json &) { return wrong.reply + "\x04"; }));
    auto qmp = Qmp::connect(folder.file("q"));
    ASSERT_TRUE(qmp);
    auto answer = (*qmp)->execute("cont");
    ASSERT_FALSE(answer);
    EXPECT_EQ(answer.error().code, ErrorCode::peer);
    EXPECT_THAT(answer.error().message, HasSubstr(wrong.words));
    EXPECT_FALSE((*qmp)->alive());
    EXPECT_FALSE((*qmp)->execute("again"));
  }
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), greeting, then([](const Json &) { return std::string(); }));
  auto qmp = Qmp::connect(folder.file("q"));
  ASSERT_TRUE(qmp);
  auto answer = (*qmp)->execute("stop", Json::object(), milliseconds(50));
  ASSERT_FALSE(answer);
  EXPECT_THAT(answer.error().message, HasSubstr("no answer in time"));
}

TEST(Qmp, BoundsTheSizeOfAReply) {
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), greeting,
                 then([](const Json &) { return std::string(reply_bytes_max + 100'000, 'a'); }));
  auto qmp = Qmp::connect(folder.file("q"));
  ASSERT_TRUE(qmp);
  auto answer = (*qmp)->execute("x");
  ASSERT_FALSE(answer);
  EXPECT_THAT(answer.error().message, HasSubstr("more than"));
}

// The longest messages, of the values that take the most memory for their text.
TEST(Qmp, HostileJsonTakesBoundedMemory) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer needs more address space than this test allows";
#endif
  std::string empties = "[[]";
  while (empties.size() < reply_bytes_max - 3) {
    empties += ",[]";
  }
  const std::string texts[] = {std::string(reply_bytes_max, '['), empties + "]"};
  for (const std::string &text : texts) {
    const pid_t child = ::fork();
    if (child == 0) {
      const rlimit limit = {768 << 20, 768 << 20};
      ::setrlimit(RLIMIT_AS, &limit);
      try {
        const Json parsed = parse_json(text);
        ::_exit(parsed.is_discarded() == (text[1] == '[' && text[2] == '[') ? 0 : 1);
      } catch (const std::exception &) {
        ::_exit(2);
      }
    }
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << text.substr(0, 6);
  }
}

TEST(Qmp, DeepNestingIsLeftOut) {
  const std::string deep(json_depth_max + 1, '[');
  const Json parsed = parse_json("{\"id\":1,\"x\":" + deep + std::string(deep.size(), ']') + "}");
  EXPECT_EQ(number_at(parsed, "id"), 1U);
  unsigned depth = 0;
  for (const Json *value = &at(parsed, "x"); value->is_array() && !value->empty();
       value = &value->front()) {
    ++depth;
  }
  EXPECT_LT(depth, static_cast<unsigned>(json_depth_max));
  EXPECT_GT(depth, static_cast<unsigned>(json_depth_max) - 5);
}

TEST(Qmp, HumanOutputMustBeText) {
  const TemporaryFolder folder;
  FakeQmp server(folder.file("q"), greeting,
                 then([](const Json &request) { return returns(request, Json::array()); }));
  auto qmp = Qmp::connect(folder.file("q"));
  ASSERT_TRUE(qmp);
  EXPECT_FALSE((*qmp)->human("info ramblock"));
}

}  // namespace
}  // namespace qvmstate::qemu
