"""Small parts that several views share; the JavaScript beside them draws text, never markup."""
