"""What each operation means, in the plainest torch that says it. Only tests call these, to hold all paths against them."""
