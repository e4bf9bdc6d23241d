"""What is said on the wire to users: `serving.proto` and the stubs generated from it (`make protos`)."""
