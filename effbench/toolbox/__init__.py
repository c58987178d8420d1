"""What a technique's author may reuse."""
