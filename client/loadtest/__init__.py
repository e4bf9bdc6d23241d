"""The load-testing harness behind `tramontane bench`: how hard a server can be pushed, told truthfully.

Its packages come with the extra `bench`; nothing outside this folder imports it.
"""
