#include "plugin/qemu/block_nodes.h"

#include <gtest/gtest.h>

namespace qvmstate::qemu {
namespace {

TEST(BlockNodes, FindsThePathInANodesName) {
  EXPECT_EQ(path_of_node_name("/vm/a.qcow2"), "/vm/a.qcow2");
  EXPECT_EQ(path_of_node_name("a b.qcow2"), "a b.qcow2");
  EXPECT_EQ(path_of_node_name("file:/vm/a.qcow2"), "/vm/a.qcow2");
  EXPECT_EQ(path_of_node_name("host_device:/dev/vg/lv"), "/dev/vg/lv");
  EXPECT_EQ(path_of_node_name("/dev/fdset/3"), "/dev/fdset/3");
  EXPECT_EQ(path_of_node_name("json:{\"driver\": \"file\", \"filename\": \"/vm/a\"}"), "/vm/a");
  EXPECT_EQ(path_of_node_name(
                "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/x\"}}"),
            "/x");
  EXPECT_EQ(path_of_node_name("json:{\"driver\":\"qcow2\",\"file.filename\":\"/x\"}"), "/x");
}

TEST(BlockNodes, FindsNoPathWhereThereIsNone) {
  for (const char *name : {"", "json:", "json:{", "json:[1]", "json:{\"filename\":7}",
                           "json:{\"driver\":\"null-co\"}", "json:null"}) {
    EXPECT_EQ(path_of_node_name(name), "") << name;
  }
}

}  // namespace
}  // namespace qvmstate::qemu
